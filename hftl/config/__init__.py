"""Run configuration: frozen dataclasses with the same names in Python, YAML and flags."""
