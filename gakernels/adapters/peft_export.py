"""Writing an adapter as a PEFT folder, and vLLM's rules for such folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F

from gakernels.adapters.factors import AdapterFactors
from gakernels.errors import InputError
from gakernels.files import replacing_folder, write_plain_tensors

# The values of vLLM's --max-lora-rank, and the names of the linear layers in its decoder models.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_MODULES = frozenset(
    {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"}
)


def write_peft(adapter: AdapterFactors, folder: Path, for_vllm: bool) -> None:
    """See `Adapter.save_peft`."""
    if for_vllm:
        adapter = fit_vllm(adapter)
    tensors = {f"base_model.model.{name}.lora_A.weight": factor for name, factor in adapter.lora_a.items()}
    for name, factor in adapter.lora_b.items():
        tensors[f"base_model.model.{name}.lora_B.weight"] = factor * adapter.scale
    with replacing_folder(folder) as temporary:
        write_plain_tensors(temporary / "adapter_model.safetensors", tensors)
        (temporary / "adapter_config.json").write_text(json.dumps(_config(adapter), indent=2) + "\n")


def fit_vllm(adapter: AdapterFactors) -> AdapterFactors:
    """The adapter zero-padded to a rank that vLLM can be started with: zero rows in lora_A, zero columns in lora_B.

    Raises:
        InputError: there is no such rank, or the adapter adapts a layer that vLLM's models do not have.
    """
    unknown = [name for name in adapter.lora_a if name.rpartition(".")[2] not in VLLM_MODULES]
    if unknown:
        known = ", ".join(sorted(VLLM_MODULES))
        raise InputError(f"vLLM can't load an adapter of {unknown[0]}; the linear layers that it adapts are {known}")
    rank = next((rank for rank in VLLM_RANKS if rank >= adapter.rank), None)
    if rank is None:
        raise InputError(f"vLLM loads adapters of rank {VLLM_RANKS[-1]} at most, but this one has {adapter.rank}")
    more = rank - adapter.rank
    return replace(
        adapter,
        lora_a={name: F.pad(factor, (0, 0, 0, more)) for name, factor in adapter.lora_a.items()},
        lora_b={name: F.pad(factor, (0, more)) for name, factor in adapter.lora_b.items()},
    )


def _config(adapter: AdapterFactors) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "target_modules": sorted(adapter.target_modules or adapter.lora_a),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
