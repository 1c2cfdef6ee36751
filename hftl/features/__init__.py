"""Cached features of frozen backbones, for head training, backbone ranking and data checks."""
