"""Blocks, figures and the page template of reports."""
