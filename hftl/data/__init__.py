"""Data sources: dataset splits, column detection, row validation, image and table decoding."""
