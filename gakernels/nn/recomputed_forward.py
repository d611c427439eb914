"""RecomputedForward: a layer that keeps only its input and recomputes everything else in the backward."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gakernels.nn.adapted_linear import AdaptedLinear
from gakernels.nn.cpu_attention import same_attention
from gakernels.nn.factors_in_force import Block


class RecomputedForward:
    """Stands as `forward` in a layer: the same bits in less memory.

    What hooks do before the layer, such as forming its adapters, is not repeated.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self._layer).forward
        if not torch.is_grad_enabled():
            return forward(self._layer, *args, **kwargs)
        # By the time of the backward other factors may be in use, and another attention.
        linears = [module for module in self._layer.modules() if isinstance(module, AdaptedLinear)]
        factors: dict[nn.Module, Any] = {linear: linear.current_factors() for linear in linears}
        attention = same_attention()

        def run(*args: Any, **kwargs: Any) -> Any:
            with Block(factors).in_force(), attention():
                return forward(self._layer, *args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
