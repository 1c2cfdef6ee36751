"""Confidence intervals and bootstrap."""
