"""From a name to splits, columns, and batches."""
