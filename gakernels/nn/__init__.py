"""Drop-in modules on top of the operations."""

from gakernels.nn.adapted_linear import AdaptedLinear, LowRankFactors
from gakernels.nn.adapter_generator import AdapterGenerator

__all__ = ["AdaptedLinear", "AdapterGenerator", "LowRankFactors"]
