"""Writing an adapter as a GGUF LoRA file for llama.cpp."""

from __future__ import annotations

import re
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gakernels.adapters.factors import AdapterFactors
from gakernels.errors import InputError
from gakernels.files import replacing

# transformers' model_type: llama.cpp's architecture, where the two names differ by more than their separators.
_ARCHITECTURES = {
    "bamba": "granitehybrid",
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "deepseek_v32": "deepseek32",
    "exaone4_5": "exaone4",
    "gemma4_unified": "gemma4",
    "glm": "chatglm",
    "glm4_moe_lite": "deepseek2",
    "glm4v": "glm4",
    "glm4v_moe": "glm4moe",
    "glm_moe_dsa": "glm-dsa",
    "glm_ocr": "glm4",
    "gpt-sw3": "gpt2",
    "gpt_bigcode": "starcoder",
    "granitemoe_swa": "granite_swa",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "internlm3": "llama",
    "iquestcoder": "llama",
    "mimo_v2_flash": "mimo2",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen2_5_vl": "qwen2vl",
    "solar_open": "glm4moe",
    "youtu": "deepseek2",
}
# For these, llama.cpp rotates neighbouring pairs of a head and transformers its two halves: the rows are reordered.
_INTERLEAVED = frozenset({"arcee", "granite", "granite_swa", "granitemoe", "llama", "mistral3", "olmo", "smollm3"})
# These keep queries, keys and values as one layer, by groups of heads; llama.cpp has all queries first, then all keys.
_GROUPED = frozenset({"bloom", "falcon", "gptneox"})
# Architectures that no converter of llama.cpp writes, or in which it scales the weights. Layers that it splits,
# transposes or reorders in ways of their own, or (in hybrid Granite models) in one version and not in another.
_OTHER_ARCHITECTURES = frozenset({"bitnet", "gptj"})
_OTHER_LAYERS = re.compile(
    r"^(?!minicpm3).*\.kv_b_proj$|\.linear_attn\.|^falcon-h1 .*\.mamba\.in_proj$|^granitehybrid .*\.[qk]_proj$"
)


def write_gguf(adapter: AdapterFactors, path: Path) -> None:
    """See `Adapter.save_gguf`.

    llama.cpp multiplies by adapter.lora.alpha / r. Alpha is r here, and the scale is multiplied into lora_b.
    """
    gguf = _import_gguf()
    architecture = _architecture(gguf, adapter)
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


def _architecture(gguf: Any, adapter: AdapterFactors) -> str:
    if not adapter.base_config:
        raise InputError("the adapter does not name its base model (an early file?); make it again to export it")
    kind = adapter.base_config["model_type"]
    wanted = _ARCHITECTURES.get(kind, _plain(kind.removesuffix("_text")))
    found = next((name for name in gguf.MODEL_ARCH_NAMES.values() if _plain(name) == _plain(wanted)), None)
    if found is None or found in _OTHER_ARCHITECTURES:
        raise InputError(
            f"GGUF export (gguf {version('gguf')}) does not know {kind} models, and this adapter is for one"
        )
    return found


def _plain(name: str) -> str:
    """An architecture's name without separators, in which transformers and llama.cpp often differ."""
    return re.sub("[-_.]", "", name)


def _tensor_name(gguf: Any, architecture: str, adapter: AdapterFactors, name: str) -> str:
    """llama.cpp's name of the weight of a linear layer: `blk.3.attn_output.weight`."""
    number = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(number, adapter.base_config["num_hidden_layers"])
    target: str | None = names.get_name(f"{name.replace('language_model.', '')}.weight", try_suffixes=(".weight",))
    if target is None or _OTHER_LAYERS.search(f"{architecture} {name}"):
        raise InputError(f"GGUF export does not know llama.cpp's form of {name} in a {architecture} model")
    return target


def _llama_cpp_rows(adapter: AdapterFactors, architecture: str, name: str, lora_b: Tensor) -> Tensor:
    """The rows of lora_B in llama.cpp's order."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.rpartition(".")[2])
    if heads is not None and architecture in _INTERLEAVED:
        return _interleaved(name, lora_b, adapter.base_config[heads])
    if name.endswith(".query_key_value") and architecture in _GROUPED:
        return _ungrouped(lora_b, adapter.base_config["num_attention_heads"], adapter.lora_a[name].shape[1])
    return lora_b


def _interleaved(name: str, lora_b: Tensor, heads: int) -> Tensor:
    """For a rotary embedding that pairs rows 2i and 2i + 1 of a head, in place of its two halves."""
    if len(lora_b) % (2 * heads):
        raise InputError(f"{name} must have rows for {heads} heads of an even size, but it has {len(lora_b)}")
    halves = lora_b.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(lora_b.shape)


def _ungrouped(lora_b: Tensor, heads: int, hidden_size: int) -> Tensor:
    """All queries, keys and values one after the other, from groups of some query heads, one key and one value."""
    rows = lora_b.unflatten(0, (-1, hidden_size // heads))  # one entry for each head
    groups = rows.unflatten(0, ((len(rows) - heads) // 2, -1))
    parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
    return torch.cat([part.reshape(-1, lora_b.shape[1]) for part in parts])


def _add_tensor(gguf: Any, writer: Any, name: str, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no such type
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind).view(_Array), raw_dtype=kind)
    else:
        numbers = tensor if tensor.dtype == torch.float16 else tensor.float()
        writer.add_tensor(name, numbers.numpy().view(_Array))
