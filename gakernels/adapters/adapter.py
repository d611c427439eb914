"""Adapter: the low-rank factors generated from one context."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gakernels.adapters.factors import AdapterFactors
from gakernels.adapters.gguf_export import write_gguf
from gakernels.adapters.peft_export import write_peft
from gakernels.errors import FormatError, InputError
from gakernels.files import by_suffix, count_entry, entry, read_tensors, write_tensors


class Adapter(AdapterFactors):
    """A low-rank adapter of some linear layers of a base model, with file formats; attributes: see `AdapterFactors`."""

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; `load` reads it.

        Raises:
            InputError: `path` is a folder.
            OSError: it could not be written; an existing file of that name is unchanged.
        """
        tensors = {f"{name}.lora_A": factor for name, factor in self.lora_a.items()}
        tensors |= {f"{name}.lora_B": factor for name, factor in self.lora_b.items()}
        write_tensors(Path(path), "adapter", tensors, self._description())

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file.
            FormatError: it is damaged or not an adapter.
        """
        path = Path(path)
        tensors, description = read_tensors(path, "adapter")
        lora_a, lora_b = by_suffix(path, tensors, ".lora_A", ".lora_B")
        _check_factors(path, lora_a, lora_b)
        return cls(lora_a, lora_b, **_read_description(path, description))

    def save_peft(self, folder: str | Path, for_vllm: bool = False) -> None:
        """Write a PEFT LoRA folder, which peft, vLLM and LoRAX load (docs/formats.md).

        lora_alpha equals r and the scale is multiplied into lora_B, because some readers support only one global alpha.
        Other files in the folder stay.

        Args:
            folder: the folder.
            for_vllm: follow vLLM's rules too: the factors are zero-padded to a rank that vLLM can be started with.

        Raises:
            InputError: `folder` is a file, or vLLM can't load such an adapter: its rank is above 512, or it adapts
                layers that vLLM's models do not have under that name.
            OSError: it could not be written; an existing adapter is unchanged.
        """
        write_peft(self, Path(folder), for_vllm)

    def save_gguf(self, path: str | Path) -> None:
        """Write a GGUF LoRA file, which llama.cpp loads (docs/formats.md). Needs the package `gguf`.

        The tensors are written in the adapter's dtype: float32, float16 or bfloat16.

        Raises:
            InputError: the package is missing; llama.cpp's name or row order of an adapted layer is unknown for this
                kind of base model; or `path` is a folder.
            OSError: it could not be written; an existing file of that name is unchanged.
        """
        write_gguf(self, Path(path))

    def _description(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _DESCRIPTION}


_DESCRIPTION = (
    "scale",
    "base_fingerprint",
    "generator_fingerprint",
    "base_name",
    "tokens_seen",
    "target_modules",
    "base_config",
)


def _read_description(path: Path, description: dict[str, Any]) -> dict[str, Any]:
    """The attributes that the header holds, with their types checked."""
    values = {name: entry(path, description, name, str) for name in _DESCRIPTION[1:4]}
    targets = entry(path, description, "target_modules", list)
    if not all(isinstance(target, str) for target in targets):
        raise FormatError(f"{path} is damaged: its entry 'target_modules' must be a list of names")
    return {
        **values,
        "scale": float(entry(path, description, "scale", float)),
        "tokens_seen": count_entry(path, description, "tokens_seen"),
        "target_modules": tuple(targets),
        "base_config": _read_base_config(path, entry(path, {"base_config": {}, **description}, "base_config", dict)),
    }


def _read_base_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The base config, with its entries checked; early files have none."""
    if config:
        entry(path, config, "model_type", str)
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            count_entry(path, config, name, least=1)
    return config


def _check_factors(path: Path, lora_a: dict[str, Tensor], lora_b: dict[str, Tensor]) -> None:
    factors = [*lora_a.values(), *lora_b.values()]
    plain = all(factor.dim() == 2 and factor.is_floating_point() for factor in factors)
    ranks = {a.shape[:1] for a in lora_a.values()} | {b.shape[-1:] for b in lora_b.values()}
    if not lora_a or set(lora_a) != set(lora_b) or not plain or len(ranks) != 1:
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
