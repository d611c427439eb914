"""Benchmarks of gakernels: see docs/benchmarks.md."""
