"""A frozen linear layer with a low-rank adapter per window: y = W x + scale lora_B (lora_A x) (+ bias)."""

from typing import Any

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.ops import autocast, checks
from gakernels.ops.dispatch import choose
from gakernels.ops.lowrank_linear import eager, reference
from gakernels.ops.registration import differentiate, operator

__all__ = ["lowrank_linear"]


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float = 1.0,
    adapter_index: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply a frozen linear layer and, to each window, its own low-rank adapter (equation 9 of the paper).

    Args:
        x: (windows, M, d_in).
        weight: (d_out, d_in), frozen: it gets no gradient and x is not kept for one.
        lora_a: (adapters, r, d_in), the factor V^T B2.
        lora_b: (adapters, d_out, r), the factor A1 U.
        scale: factor of the low-rank term.
        adapter_index: (windows,) int64, the adapter of each window, -1 for none. Not given: window i uses adapter i.
            The values must lie in -1..adapters-1; they are not checked, which would synchronise with the device.
        bias: (d_out,), frozen.

    Returns:
        (windows, M, d_out), in the dtype of x.

    Raises:
        InputError: a shape, dtype or device does not fit, or weight or bias require a gradient.
    """
    _check(x, weight, lora_a, lora_b, adapter_index, bias)
    x, weight, lora_a, lora_b = autocast.cast(x.device, x, weight, lora_a, lora_b)
    bias = None if bias is None else autocast.cast(x.device, bias)[0]
    backend = choose("lowrank_linear", x, weight, lora_a, lora_b, scale, adapter_index, bias).backend
    if backend == "reference":
        return reference.lowrank_linear(x, weight, lora_a, lora_b, scale, adapter_index, bias)
    y: Tensor = _operator(x, weight, lora_a, lora_b, scale, adapter_index, bias, backend)[0]
    return y


def _check(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, adapter_index: Tensor | None, bias: Tensor | None
) -> None:
    checks.check_shape("x", x, ("windows", "M", "d_in"))
    checks.check_dtype("x", x, checks.FLOATING)
    windows, _, in_features = x.shape
    checks.check_shape("weight", weight, ("d_out", in_features))
    adapters: int | str = windows if adapter_index is None else "adapters"
    checks.check_shape("lora_a", lora_a, (adapters, "r", in_features))
    checks.check_shape("lora_b", lora_b, (lora_a.shape[0], weight.shape[0], lora_a.shape[1]))
    if adapter_index is not None:
        checks.check_shape("adapter_index", adapter_index, (windows,))
        checks.check_dtype("adapter_index", adapter_index, (torch.int64,))
        if lora_a.shape[0] == 0:
            raise InputError("lora_a must hold at least one adapter, but its shape is " + str(tuple(lora_a.shape)))
    if bias is not None:
        checks.check_shape("bias", bias, (weight.shape[0],))
    if not autocast.is_enabled(x.device):
        checks.check_same("x", x, weight=weight, lora_a=lora_a, lora_b=lora_b, bias=bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise InputError(f"{name} must be frozen (requires_grad=False): this operation computes no gradient for it")


@operator("lowrank_linear")
def _operator(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    adapter_index: Tensor | None,
    bias: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    windows, tokens, _ = x.shape
    return x.new_empty(windows, tokens, weight.shape[0]), x.new_empty(windows, tokens, lora_a.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_a, lora_b, scale, adapter_index, _, ctx.backend = inputs
    z = output[1]
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)  # no zeros in place of the gradients of those
    needs_x, _, needs_a, needs_b = ctx.needs_input_grad[:4]
    ctx.scale, ctx.needs_x = scale, needs_x
    ctx.save_for_backward(x if needs_a else None, z if needs_b else None, weight, lora_a, lora_b, adapter_index)


def _backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None, None, None, None, None, None
    x, z, weight, lora_a, lora_b, adapter_index = ctx.saved_tensors
    arguments = (grad_y, x, z, weight, lora_a, lora_b, ctx.scale, adapter_index, ctx.needs_x)
    # The eager form is plain operations, which torch.compile may fuse.
    grads = eager.backward(*arguments) if ctx.backend == "eager" else _kernel_backward(*arguments, ctx.backend)
    needed = (ctx.needs_x, x is not None, z is not None)
    grad_x, grad_a, grad_b = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return grad_x, None, grad_a, grad_b, None, None, None, None


@operator("lowrank_linear", "backward")
def _kernel_backward(
    grad_y: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    adapter_index: Tensor | None,
    needs_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1]) if needs_x else (0,))
    grad_a = grad_y.new_empty((0,) if x is None else lora_a.shape)
    return grad_x, grad_a, grad_y.new_empty((0,) if z is None else lora_b.shape)


differentiate("lowrank_linear", _backward, _setup_context)
