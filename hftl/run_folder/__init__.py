"""Run folder: layout, history and checkpoint files."""
