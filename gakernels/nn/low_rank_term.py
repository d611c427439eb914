"""The low-rank term alone, added to the output of a frozen layer of any kind for the same input."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gakernels.ops import autocast
from gakernels.ops.lowrank_linear.eager import select, thin_gradients


def add_low_rank_term(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, adapter_index: Tensor | None
) -> Tensor:
    """y + scale lora_B (lora_A x), in the dtype of y: `lowrank_linear` with the frozen product computed elsewhere.

    The backward keeps x only if lora_a needs a gradient, and lora_A x only if lora_b does.

    Args:
        y: (windows, M, d_out).
        x: (windows, M, d_in).
        lora_a: (adapters, r, d_in).
        lora_b: (adapters, d_out, r).
        scale: factor of the term.
        adapter_index: (windows,) int64, the adapter of each window, -1 for none; None: window i uses adapter i.
    """
    x, lora_a, lora_b = (tensor.to(y.dtype) for tensor in (x, lora_a, lora_b))
    total: Tensor = _LowRankTerm.apply(y, x, lora_a, lora_b, scale, adapter_index)  # type: ignore[no-untyped-call]
    return total


class _LowRankTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, adapter_index: Tensor | None
    ) -> Tensor:
        _, ctx.needs_x, needs_a, needs_b = ctx.needs_input_grad[:4]
        total, z = _add(y, x, lora_a, lora_b, scale, adapter_index)
        ctx.scale = scale
        ctx.save_for_backward(x if needs_a else None, z if needs_b else None, lora_a, lora_b, adapter_index)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, lora_a, lora_b, adapter_index = ctx.saved_tensors
        needs = (ctx.needs_x, x is not None, z is not None)
        grads = _gradients(grad, x, z, lora_a, lora_b, ctx.scale, adapter_index, ctx.needs_x)
        grad_x, grad_a, grad_b = (part if need else None for part, need in zip(grads, needs, strict=True))
        return grad, grad_x, grad_a, grad_b, None, None


@autocast.without
def _add(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, adapter_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    z = x @ select(lora_a, adapter_index).mT
    return torch.baddbmm(y, z, select(lora_b, adapter_index).mT, alpha=scale), z


@autocast.without
def _gradients(
    grad: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    adapter_index: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, lora_a and lora_b; None for those that are not needed."""
    grad_z, grad_a, grad_b = thin_gradients(grad, x, z, lora_a, lora_b, scale, adapter_index, needs_x)
    grad_x = torch.bmm(grad_z, select(lora_a, adapter_index)) if needs_x and grad_z is not None else None
    return grad_x, grad_a, grad_b
