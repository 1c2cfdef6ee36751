"""Evaluation with exact metrics on any number of processes, and calibration."""
