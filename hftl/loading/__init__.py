"""Data loading: step plan, batch samplers, data loader and worker processes."""
