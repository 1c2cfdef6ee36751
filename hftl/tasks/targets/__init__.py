"""Training targets, one package per kind of label."""
