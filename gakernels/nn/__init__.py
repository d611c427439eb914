"""Drop-in modules on top of the operations."""

from gakernels.nn.adapted_linear import AdaptedLinear
from gakernels.nn.adapter_generator import AdapterGenerator
from gakernels.nn.frozen_rms_norm import FrozenRMSNorm
from gakernels.nn.gated_mlp import GatedMLP
from gakernels.nn.low_rank_factors import CompactFactors, LowRankFactors

__all__ = ["AdaptedLinear", "AdapterGenerator", "CompactFactors", "FrozenRMSNorm", "GatedMLP", "LowRankFactors"]
