"""Adapter: the low-rank factors that one context became."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gakernels.errors import FormatError, InputError
from gakernels.files import entry, read_tensors, replacing, write_plain_tensors, write_tensors


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter of some linear layers of a base model: W becomes W + scale lora_B lora_A.

    Attributes:
        lora_a: (r, d_in) by name of the layer in the base model (`model.layers.0.self_attn.o_proj`).
        lora_b: (d_out, r) by the same names.
        scale: factor of every product.
        base_fingerprint: of the base model it was made for.
        generator_fingerprint: of the generator that made it.
        base_name: name or path of the base model, for readers of the PEFT format.
        tokens_seen: number of context tokens behind it.
        target_modules: names that select exactly the adapted layers in the base model, for readers of the PEFT format:
            short ones (`o_proj`) where they do; empty for the full names.
    """

    lora_a: dict[str, Tensor]
    lora_b: dict[str, Tensor]
    scale: float
    base_fingerprint: str
    generator_fingerprint: str
    base_name: str = ""
    tokens_seen: int = 0
    target_modules: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """r, the same for every layer."""
        return next(iter(self.lora_a.values())).shape[0]

    def numbers(self) -> int:
        """How many numbers the adapter consists of."""
        return sum(factor.numel() for factor in [*self.lora_a.values(), *self.lora_b.values()])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Adapter":
        """The same adapter on another device or in another dtype."""
        lora_a, lora_b = (
            {name: factor.to(device=device, dtype=dtype) for name, factor in factors.items()}
            for factors in (self.lora_a, self.lora_b)
        )
        return Adapter(lora_a, lora_b, **self._description())

    def delta(self, name: str) -> Tensor:
        """scale lora_B lora_A (d_out, d_in), multiplied out in float32 or wider: for merging and for tests."""
        a, b = self.lora_a[name], self.lora_b[name]
        wide = torch.promote_types(a.dtype, torch.float32)
        return self.scale * (b.to(wide) @ a.to(wide))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; `load` reads it.

        Raises:
            InputError: there is a folder of that name.
            OSError: it could not be written; an older file of that name is unharmed.
        """
        tensors = {f"{name}.lora_A": factor for name, factor in self.lora_a.items()}
        tensors |= {f"{name}.lora_B": factor for name, factor in self.lora_b.items()}
        write_tensors(Path(path), "adapter", tensors, self._description())

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file.
            FormatError: it is damaged or no adapter.
        """
        path = Path(path)
        tensors, description = read_tensors(path, "adapter")
        lora_a, lora_b = (
            {name.removesuffix(suffix): tensor for name, tensor in tensors.items() if name.endswith(suffix)}
            for suffix in (".lora_A", ".lora_B")
        )
        _check_factors(path, lora_a, lora_b)
        values = {name: entry(path, description, name) for name in _DESCRIPTION}
        return cls(lora_a, lora_b, **{**values, "target_modules": tuple(values["target_modules"])})

    def save_peft(self, folder: str | Path) -> None:
        """Write a PEFT LoRA folder, which peft, vLLM and LoRAX load.

        lora_alpha equals r and the scale is multiplied into lora_B, because some readers know one global alpha only.
        Other files in the folder stay.

        Raises:
            InputError: there is a file of that name.
            OSError: it could not be written; the adapter that was there is unharmed.
        """
        tensors = {f"base_model.model.{name}.lora_A.weight": factor for name, factor in self.lora_a.items()}
        for name, factor in self.lora_b.items():
            tensors[f"base_model.model.{name}.lora_B.weight"] = factor * self.scale
        with replacing(Path(folder)) as temporary:
            temporary.mkdir()
            write_plain_tensors(temporary / "adapter_model.safetensors", tensors)
            (temporary / "adapter_config.json").write_text(json.dumps(self._peft_config(), indent=2) + "\n")

    def _peft_config(self) -> dict[str, object]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_name,
            "r": self.rank,
            "lora_alpha": self.rank,
            "target_modules": sorted(self.target_modules or self.lora_a),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        }

    def _description(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _DESCRIPTION}


_DESCRIPTION = ("scale", "base_fingerprint", "generator_fingerprint", "base_name", "tokens_seen", "target_modules")


def _check_factors(path: Path, lora_a: dict[str, Tensor], lora_b: dict[str, Tensor]) -> None:
    ranks = {factor.shape[0] for factor in lora_a.values()} | {factor.shape[-1] for factor in lora_b.values()}
    if not lora_a or set(lora_a) != set(lora_b) or len(ranks) != 1:
        raise FormatError(f"{path} is damaged: it must hold lora_A and lora_B of one rank for each of its layers")


def stack(adapters: Sequence[Adapter], name: str) -> tuple[Tensor, Tensor]:
    """lora_A (n, r, d_in) and lora_B (n, d_out, r) of one layer of several adapters.

    Raises:
        InputError: there are none, or they differ in scale or rank.
    """
    if not adapters:
        raise InputError("adapters must be at least one adapter, but there is none")
    if len({(adapter.scale, adapter.rank) for adapter in adapters}) != 1:
        raise InputError("adapters must all have the same scale and rank to be used in one batch")
    return (
        torch.stack([adapter.lora_a[name] for adapter in adapters]),
        torch.stack([adapter.lora_b[name] for adapter in adapters]),
    )
