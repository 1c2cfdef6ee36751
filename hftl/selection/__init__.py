"""Backbone ranking, method comparison and transfer gain."""
