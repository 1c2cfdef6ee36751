"""Refuse early, start, and train."""
