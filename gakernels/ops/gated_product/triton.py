"""`gated_product` in a Triton kernel for each direction: three passes over its tensors forward, five backward."""

from typing import Any

import torch
import triton
from torch import Tensor

from gakernels.ops import launching, tuned
from gakernels.ops.gated_product import kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(gate: Tensor, up: Tensor) -> str | None:
    """Why the kernels can't run these arguments here, or None if they can. They take any sizes and strides."""
    if gate.dtype not in DTYPES:
        return f"the kernels compute in float32, but gate is {gate.dtype}"
    return launching.obstacle(gate.device)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up, contiguous."""
    result = gate.new_empty(gate.shape)
    _launch(kernels.product, gate, up, result)
    return result


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, contiguous."""
    grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _launch(kernels.gradients, grad, gate, up, grad_gate, grad_up)
    return grad_gate, grad_up


def _launch(kernel: Any, *tensors: Tensor) -> None:
    """Run a kernel over all numbers of its tensors; those that are not contiguous are copied."""
    first = tensors[0]
    options = tuned.settings(f"gated_product.{kernel.fn.__name__}", first.device, first.dtype)
    grid = (triton.cdiv(first.numel(), options["NUMBERS"]),)
    launching.launch(kernel, grid, *(tensor.contiguous() for tensor in tensors), first.numel(), **options)
