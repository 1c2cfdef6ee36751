"""Heads fitted on cached features."""
