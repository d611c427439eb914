"""Curves of training runs; needs matplotlib (`pip install gakernels[plots]`)."""
