"""Single-label classification."""
