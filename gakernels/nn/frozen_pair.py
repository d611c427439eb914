"""Two frozen linear layers of one input: the second product of the backward adds to the first."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gakernels.nn import adapted_opaque_linear
from gakernels.nn.adapted_linear import has_hooks
from gakernels.ops import autocast


def can_pair(linear: nn.Module) -> bool:
    """Whether a layer is x W^T with a frozen plain weight, and nothing else happens in a call."""
    plain = adapted_opaque_linear.is_plain_linear(linear) and not has_hooks(linear)
    return plain and linear.bias is None and not linear.weight.requires_grad


def frozen_pair(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """x W1^T and x W2^T for frozen weights, x (..., d_in); the graph keeps nothing but the weights.

    The gradient of x is summed inside the second product, which saves two passes over a tensor like x and a rounding.
    """
    pair: tuple[Tensor, Tensor] = _Pair.apply(*autocast.cast(x.device, x, first, second))  # type: ignore[no-untyped-call]
    return pair


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(first, second)
        return F.linear(x, first), F.linear(x, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_first: Tensor, grad_second: Tensor) -> tuple[Tensor, None, None]:
        first, second = ctx.saved_tensors
        total = grad_first.reshape(-1, len(first)) @ first
        torch.addmm(total, grad_second.reshape(-1, len(second)), second, out=total)
        return total.view(*grad_first.shape[:-1], first.shape[1]), None, None
