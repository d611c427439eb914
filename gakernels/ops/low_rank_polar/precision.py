"""When `low_rank_polar` computes float32 states in float64 throughout (docs/numerics.md)."""

import torch

EXACT_BELOW = 1e-3  # damping under which the rounding of float32 products, which 1 / damping amplifies, would show


def is_exact(dtype: torch.dtype, damping: float) -> bool:
    """Whether all is computed in float64, for states of this dtype."""
    return dtype == torch.float64 or damping < EXACT_BELOW
