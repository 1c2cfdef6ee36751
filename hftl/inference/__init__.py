"""Prediction and evaluation with saved models."""
