"""Multi label."""
