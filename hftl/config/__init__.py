"""What a run is told: one tree of frozen dataclasses, the same names in Python, YAML and flags."""
