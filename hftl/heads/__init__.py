"""Heads trained or fitted on cached features."""
