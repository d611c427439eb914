"""A frozen language model with generators: attachment, context passes, streams, and generator files."""

from gakernels.model.base_model import load_base, locate
from gakernels.model.generative_adapter import GenerativeAdapter
from gakernels.model.pretrained import GENERATOR_FILE

__all__ = ["GENERATOR_FILE", "GenerativeAdapter", "load_base", "locate"]
