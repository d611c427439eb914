"""GatedMLP: the feed-forward part of Llama-like layers, with less memory and fewer passes around frozen weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class GatedMLP(nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)), with the linear layers of another module of this kind.

    Values and gradients are those of that module, bit for bit. Between the linear layers only two tensors are kept for
    the backward (silu of the gate is computed again), and nothing is kept for gradients of the frozen weights.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.gate_proj: nn.Module = original.gate_proj
        self.up_proj: nn.Module = original.up_proj
        self.down_proj: nn.Module = original.down_proj
        self.act_fn: nn.Module = original.act_fn  # not used; the names of the modules stay
        self._original = (original,)  # in a tuple: not a submodule

    @property
    def original(self) -> Any:
        """The module that this one stands for, with the linear layers that are here now."""
        (original,) = self._original
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(original, name, getattr(self, name))
        return original

    @classmethod
    def can_stand_for(cls, module: Any) -> bool:
        """Whether a module has these parts and computes exactly this: tried out on one random token."""
        if {name for name, _ in module.named_children()} != PARTS or next(module.parameters()).is_meta:
            return False
        weight = module.gate_proj.weight
        if not weight.is_floating_point():
            return False
        values = torch.randn(1, 1, weight.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")
        x = values.to(weight.device, weight.dtype)
        with torch.no_grad():
            return torch.equal(cls(module)(x), module(x))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_h) -> (..., d_h)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
            product = _GatedProduct.apply(gate, up)  # type: ignore[no-untyped-call]
        else:
            product = F.silu(gate).mul_(up)
        y: Tensor = self.down_proj(product)
        return y


class _GatedProduct(torch.autograd.Function):
    """silu(gate) * up, rounded as the two operations one after the other."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_silu = grad * up
        return torch.ops.aten.silu_backward(grad_silu, gate), F.silu(gate).mul_(grad)
