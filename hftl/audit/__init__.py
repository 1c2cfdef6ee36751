"""What is wrong with data before a model learns from them: leaks, copies, odd rows, labels that are likely wrong."""
