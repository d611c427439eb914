"""Evaluation of a generator against the alternatives."""
