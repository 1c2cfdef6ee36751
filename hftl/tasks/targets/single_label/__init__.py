"""Single label."""
