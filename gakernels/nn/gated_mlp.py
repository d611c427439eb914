"""GatedMLP: the feed-forward part of Llama-like layers, with less memory and fewer passes around frozen weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gakernels.nn.adapted_linear import AdaptedLinear
from gakernels.nn.adapted_opaque_linear import is_linear
from gakernels.nn.frozen_pair import can_pair, frozen_pair
from gakernels.nn.low_rank_factors import Factors
from gakernels.ops import gated_product
from gakernels.ops.dispatch import needs_backward

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
FEW = 2**20  # numbers: for fewer, launches take longer than the passes over memory that a kernel saves


class GatedMLP(nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)), with the linear layers of another module of this kind.

    Values equal that module's bit for bit, except where the kernels of `gated_product` run. Between the linear layers
    the backward keeps only two tensors (it recomputes silu of the gate), and nothing for gradients of the frozen
    weights. The gradient of x has a rounding less if neither gate_proj nor up_proj has a bias or an adapter
    (`frozen_pair`).

    Attributes:
        recompute: keep only the input and recompute gate and up in the backward: the same bits in less memory.
    """

    recompute: bool = False

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.gate_proj: nn.Module = original.gate_proj
        self.up_proj: nn.Module = original.up_proj
        self.down_proj: nn.Module = original.down_proj
        self.act_fn: nn.Module = original.act_fn  # not used; the names of the modules stay
        self._original = (original,)  # in a tuple: not a submodule

    @property
    def original(self) -> Any:
        """The module that this one replaces, with this module's current linear layers."""
        (original,) = self._original
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(original, name, getattr(self, name))
        return original

    @classmethod
    def can_stand_for(cls, module: Any) -> bool:
        """Whether a module has these parts and computes exactly this: tested on one random token."""
        if {name for name, _ in module.named_children()} != PARTS or next(module.parameters()).is_meta:
            return False
        gate = module.gate_proj
        if not is_linear(gate):
            return False
        values = torch.randn(1, 1, gate.in_features, generator=torch.Generator().manual_seed(0), device="cpu")
        packed = not gate.weight.is_floating_point() or gate.weight.element_size() == 1
        x = values.to(gate.weight.device, torch.bfloat16 if packed else gate.weight.dtype)
        with torch.no_grad():
            return torch.equal(cls(module)(x), module(x))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_h) -> (..., d_h)."""
        if self.recompute and torch.is_grad_enabled():
            # By the time of the backward other factors may be in use.
            factors = [_factors(linear) for linear in (self.gate_proj, self.up_proj)]
            product = checkpoint(self._with_factors, x, *factors, use_reentrant=False, preserve_rng_state=False)
        else:
            product = _product(*(self._pair(x) or (self.gate_proj(x), self.up_proj(x))))
        y: Tensor = self.down_proj(product)
        return y

    def _with_factors(self, x: Tensor, gate_factors: Factors, up_factors: Factors) -> Tensor:
        pair = self._pair(x) or (_apply(self.gate_proj, x, gate_factors), _apply(self.up_proj, x, up_factors))
        return _product(*pair)

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """gate and up by `frozen_pair` where that is possible and of use."""
        if not needs_backward((x,)) or not (can_pair(self.gate_proj) and can_pair(self.up_proj)):
            return None
        weights: Any = (self.gate_proj.weight, self.up_proj.weight)
        return frozen_pair(x, *weights)


def _factors(linear: nn.Module) -> Factors:
    return linear.current_factors() if isinstance(linear, AdaptedLinear) else None


def _apply(linear: nn.Module, x: Tensor, factors: Factors) -> Tensor:
    y: Tensor = linear.product(x, factors) if isinstance(linear, AdaptedLinear) else linear(x)
    return y


def _product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if gate.numel() < FEW and not needs_backward((gate, up)):
        return F.silu(gate).mul_(up)
    return gated_product(gate, up)
