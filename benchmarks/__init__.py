"""Benchmarks: `python -m benchmarks NAME` prints a table and, on the last line, the result as JSON."""
