"""Training loop, optimizer, head search, probe, checkpointing and stop signals."""
