"""Run setup, recipes and child processes."""
