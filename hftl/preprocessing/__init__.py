"""Rows to model inputs, with their collate functions."""
