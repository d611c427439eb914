"""Drop-in modules on top of the operations."""

from gakernels.nn.adapted_linear import AdaptedLinear, CompactFactors, LowRankFactors
from gakernels.nn.adapter_generator import AdapterGenerator
from gakernels.nn.frozen_rms_norm import FrozenRMSNorm
from gakernels.nn.gated_mlp import GatedMLP

__all__ = ["AdaptedLinear", "AdapterGenerator", "CompactFactors", "FrozenRMSNorm", "GatedMLP", "LowRankFactors"]
