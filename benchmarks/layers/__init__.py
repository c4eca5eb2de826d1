"""Benchmarks of what stands around the ops: a decode step, its GPUs, a prefill."""
