"""The product in a gated feed-forward part, silu(gate) * up, with the gate recomputed in the backward."""

from typing import Any

import torch
from torch import Tensor

from gakernels.ops import checks
from gakernels.ops.dispatch import choose
from gakernels.ops.gated_product import eager, reference
from gakernels.ops.registration import differentiate, operator

__all__ = ["gated_product"]


def gated_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded like the two operations of PyTorch: silu in float32, the product of what is stored.

    The graph keeps gate and up only. The gradients are rounded like PyTorch's as well. `eager` gives the same bits as
    `F.silu(gate) * up`; for `triton` see docs/gated_product.md. torch.compile sees the kernel as one node, and plain
    operations, which it may fuse, where `eager` runs. Autocast changes nothing.

    Args:
        gate: any shape.
        up: the shape and dtype of gate.

    Returns:
        The shape and dtype of gate.

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    checks.check_dtype("gate", gate, checks.FLOATING)
    checks.check_shape("up", up, tuple(gate.shape))
    checks.check_same("gate", gate, up=up)
    backend = choose("gated_product", gate, up).backend
    if backend == "reference" or (backend == "eager" and torch.compiler.is_compiling()):
        return reference.gated_product(gate, up)
    product: Tensor = _operator(gate, up, backend)
    return product


@operator("gated_product")
def _operator(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments = grad, *ctx.saved_tensors
    # The eager form is plain operations, which torch.compile may fuse.
    grads = eager.backward(*arguments) if ctx.backend == "eager" else _kernel_backward(*arguments, ctx.backend)
    return *grads, None


@operator("gated_product", "backward")
def _kernel_backward(grad: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


differentiate("gated_product", _backward, _setup_context)
