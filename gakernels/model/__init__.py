"""A frozen language model with generators: attachment, passes over contexts, streams, and the files of a generator."""

from gakernels.model.generative_adapter import GENERATOR_FILE, GenerativeAdapter, load_base, locate

__all__ = ["GENERATOR_FILE", "GenerativeAdapter", "load_base", "locate"]
