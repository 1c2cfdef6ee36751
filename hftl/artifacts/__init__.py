"""Saving, loading, export and upload of trained models."""
