"""The executor for GPUs: kernels of our own, captured decode steps, several steps in flight."""
