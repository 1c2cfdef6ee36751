"""Step plan, data loader and its workers."""
