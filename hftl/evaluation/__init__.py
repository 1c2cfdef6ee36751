"""Exact numbers: sums divided once, over any number of processes."""
