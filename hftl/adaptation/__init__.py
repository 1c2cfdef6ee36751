"""Which parameters of a model learn."""
