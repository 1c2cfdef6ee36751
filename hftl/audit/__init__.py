"""Data audit before training: leaks, duplicates, outliers and label errors."""
