"""Kernels in C for the host processor, compiled at first use."""
