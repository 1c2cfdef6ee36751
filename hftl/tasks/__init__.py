"""Tasks: inputs, targets and their registry."""
