"""The run folder: layout, history and checkpoint files."""
