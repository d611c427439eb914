"""Writing an adapter as a GGUF LoRA file for llama.cpp."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gakernels.adapters.factors import AdapterFactors
from gakernels.errors import InputError
from gakernels.files import replacing

# Maps transformers' model_type to llama.cpp's architecture.
ARCHITECTURES = {
    "cohere": "command-r",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "starcoder2": "starcoder2",
}
# For these, llama.cpp rotates neighbouring pairs of a head and transformers its two halves: the rows are reordered.
_INTERLEAVED = frozenset({"llama", "granite", "olmo"})


def write_gguf(adapter: AdapterFactors, path: Path) -> None:
    """See `Adapter.save_gguf`.

    llama.cpp multiplies by adapter.lora.alpha / r. Alpha is r here, and the scale is multiplied into lora_b.
    """
    gguf = _import_gguf()
    architecture = _architecture(adapter)
    tensors = {}
    for name in adapter.lora_a:
        target = _tensor_name(gguf, architecture, adapter, name)
        tensors[f"{target}.lora_a"] = adapter.lora_a[name]
        tensors[f"{target}.lora_b"] = _llama_cpp_rows(adapter, architecture, name, adapter.lora_b[name] * adapter.scale)
    with replacing(path) as temporary, closing(gguf.GGUFWriter(temporary, architecture)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
        writer.add_string("gakernels.base_fingerprint", adapter.base_fingerprint)
        writer.add_string("gakernels.generator_fingerprint", adapter.generator_fingerprint)
        for name, tensor in tensors.items():
            _add_tensor(gguf, writer, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


class _Array(np.ndarray[Any, Any]):
    """NumPy's own `tofile` reports no error if the disk fills up with less than its buffer left to write."""

    def tofile(self, file: Any, sep: str = "", format: str = "%s") -> None:
        """With the signature that the package gguf calls."""
        file.write(self.tobytes())


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError("writing GGUF files needs the package gguf: pip install 'gakernels[gguf]'") from error
    return gguf


def _architecture(adapter: AdapterFactors) -> str:
    if not adapter.base_config:
        raise InputError("the adapter does not say what its base model is (an early file?); make it again to export it")
    kind = adapter.base_config["model_type"]
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"GGUF export knows the base models {known}, but this adapter is for a {kind} model")
    return ARCHITECTURES[kind]


def _tensor_name(gguf: Any, architecture: str, adapter: AdapterFactors, name: str) -> str:
    """llama.cpp's name of the weight of a linear layer: `blk.3.attn_output.weight`."""
    number = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(number, adapter.base_config["num_hidden_layers"])
    target: str | None = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
    if target is None or name.endswith("query_key_value"):  # llama.cpp orders its rows differently
        raise InputError(f"GGUF export does not know llama.cpp's form of {name} in a {architecture} model")
    return target


def _llama_cpp_rows(adapter: AdapterFactors, architecture: str, name: str, lora_b: Tensor) -> Tensor:
    """The rows of lora_B in llama.cpp's order: its rotary embedding pairs rows 2i and 2i + 1 of a head."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.rpartition(".")[2])
    if heads is None or architecture not in _INTERLEAVED:
        return lora_b
    count = adapter.base_config[heads]
    if len(lora_b) % (2 * count):
        raise InputError(f"{name} must have rows for {count} heads of an even size, but it has {len(lora_b)}")
    halves = lora_b.unflatten(0, (count, 2, -1))
    return halves.transpose(1, 2).reshape(lora_b.shape)


def _add_tensor(gguf: Any, writer: Any, name: str, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no such type
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind).view(_Array), raw_dtype=kind)
    else:
        numbers = tensor if tensor.dtype == torch.float16 else tensor.float()
        writer.add_tensor(name, numbers.numpy().view(_Array))
