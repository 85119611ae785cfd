"""Speed, measured: data loading, the training step part by part, both together, and the hardware's limits."""
