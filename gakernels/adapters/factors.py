"""The factors of an adapter, and their product."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gakernels.errors import InputError

_Factors = TypeVar("_Factors", bound="AdapterFactors")


@dataclass(frozen=True)
class AdapterFactors:
    """A low-rank adapter of some linear layers of a base model: W becomes W + scale lora_B lora_A.

    Attributes:
        lora_a: (r, d_in) by name of the layer in the base model (`model.layers.0.self_attn.o_proj`).
        lora_b: (d_out, r) under the same names.
        scale: factor of every product.
        base_fingerprint: fingerprint of the base model it was made for.
        generator_fingerprint: fingerprint of the generator that made it.
        base_name: name or path of the base model, for readers of the PEFT format.
        tokens_seen: number of context tokens it was generated from.
        target_modules: names that select exactly the adapted layers of the base model, for readers of the PEFT format:
            short ones (`o_proj`) where these suffice; empty for the full names.
        base_config: what readers of other formats need to know about the base model: `model_type`, `num_hidden_layers`,
            `num_attention_heads` and `num_key_value_heads`, as transformers names them; empty in early files.
    """

    lora_a: dict[str, Tensor]
    lora_b: dict[str, Tensor]
    scale: float
    base_fingerprint: str
    generator_fingerprint: str
    base_name: str = ""
    tokens_seen: int = 0
    target_modules: tuple[str, ...] = ()
    base_config: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """r, the same for every layer."""
        return next(iter(self.lora_a.values())).shape[0]

    def numbers(self) -> int:
        """How many numbers the factors hold."""
        return sum(factor.numel() for factor in [*self.lora_a.values(), *self.lora_b.values()])

    def bytes(self) -> int:
        """How many bytes the factors take as they are."""
        return sum(factor.nbytes for factor in [*self.lora_a.values(), *self.lora_b.values()])

    def to(self: _Factors, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> _Factors:
        """The same adapter on another device or in another dtype."""
        lora_a, lora_b = (
            {name: factor.to(device=device, dtype=dtype) for name, factor in factors.items()}
            for factors in (self.lora_a, self.lora_b)
        )
        return replace(self, lora_a=lora_a, lora_b=lora_b)

    def scaled(self: _Factors, factor: float) -> _Factors:
        """The same factors with the scale multiplied by `factor`: 0 turns the adapter off, 0.5 halves it, and so on.

        Raises:
            InputError: the factor is not finite.
        """
        if not math.isfinite(factor):
            raise InputError(f"factor must be finite, but it is {factor}")
        return replace(self, scale=self.scale * factor)

    def delta(self, name: str) -> Tensor:
        """scale lora_B lora_A (d_out, d_in), computed in float32 or wider, for merging and for tests."""
        a, b = self.lora_a[name], self.lora_b[name]
        wide = torch.promote_types(a.dtype, torch.float32)
        return self.scale * (b.to(wide) @ a.to(wide))
