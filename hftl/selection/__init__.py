"""Before and between trainings: which backbone, which way of adapting, and did transfer help."""
