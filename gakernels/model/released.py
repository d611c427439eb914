"""Reading and writing generators in the format of the authors' released code (docs/formats.md).

Its state matrix is the transpose of S: Delta W = (alpha / d_r) B norm(M)^T A1 with M = S^T. So its sketch multiplies
S^T (`sketch_side="output"`), and its tensors have other names:

    released                    gakernels                             released shape
    fastlora_hidden_state_norm  norm_weight                           (d_h,)
    fastlora_A1                 input_map, B2                         (d_r, d_in)
    fastlora_A2                 key_projection, B1, transposed        (d_r, d_h)
    fastlora_A3                 value_projection, A2                  (d_r, d_h)
    fastlora_B                  output_map, A1                        (d_out, d_r)

A checkpoint holds no sketch, because the released code draws a new one in every call; gakernels draws it once, from a
seed.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gakernels.errors import FormatError, InputError
from gakernels.files import entry, read_plain_tensors, replacing_folder, write_plain_tensors
from gakernels.model.attached_generators import AttachedGenerators
from gakernels.model.attachment import unwrapped
from gakernels.model.base_model import load_base, locate
from gakernels.model.config import GeneratorConfig
from gakernels.model.pretrained import GENERATOR_FILE, Pretrained

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# The released code has no damping, so the norm of a state of fewer than r tokens is undefined. This damping makes it
# defined, and changes the adapter of a full state by less than float32 rounding does (docs/formats.md).
RELEASED_DAMPING = 1e-6

_PARTS = {
    "fastlora_hidden_state_norm": "norm_weight",
    "fastlora_A1": "input_map",
    "fastlora_A2": "key_projection",
    "fastlora_A3": "value_projection",
    "fastlora_B": "output_map",
}
_TRANSPOSED = "key_projection"
_NORMS = {"svd": "polar", "frobenius": "frobenius"}
_NAME = re.compile(
    r"base_model\.model\.(?P<layers>(?:model\.)*layers)\.(?P<number>\d+)\.base_layer\.(?P<linear>[\w.]+)"
    r"\.(?P<part>fastlora_\w+)\.weight"
)


def is_released(folder: Path) -> bool:
    """Whether a folder has the authors' layout rather than this library's."""
    return (folder / CONFIG_FILE).is_file() and not (folder / GENERATOR_FILE).is_file()


def read_released(
    folder: str | Path,
    base: nn.Module | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    damping: float = RELEASED_DAMPING,
    seed: int = 0,
    **base_options: Any,
) -> Pretrained:
    """Read a released generator, with its base model and tokenizer.

    Args:
        folder: the checkpoint: `adapter_config.json` and `adapter_model.safetensors`.
        base: the base model, or its name or path; by default the one that the checkpoint names. The format has no
            fingerprint of it, so only the shapes are checked.
        tokenizer: by default, if the base model is loaded here, the checkpoint's tokenizer or else the base model's.
        damping: tau. 0 is what the released code computes, for contexts of at least r tokens.
        seed: seed of the sketches.
        base_options: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        InputError: a file or model is missing.
        FormatError: the checkpoint is damaged, uses unsupported features, or does not fit the base model.
    """
    folder = Path(folder)
    config, base_name = _read_config(folder / CONFIG_FILE, damping, seed)
    if not (folder / WEIGHTS_FILE).is_file() and list(folder.glob("adapter_model.*")):
        raise FormatError(
            f"{folder} has its numbers in a pickle, which may run code when it is read; only {WEIGHTS_FILE} is read"
        )
    source = folder / WEIGHTS_FILE
    tensors = _own_tensors(source, read_plain_tensors(source))
    _check_sizes(source, config, tensors)
    numbers, linears = _sites(source, tensors)
    if not isinstance(base, nn.Module):
        tokenizer_there = str(folder) if (folder / "tokenizer_config.json").is_file() else None
        name = locate(folder, base_name if base is None else str(base))
        base, tokenizer = load_base(name, tokenizer, tokenizer_name=tokenizer_there, **base_options)
    base = unwrapped(base)
    every = numbers == tuple(range(base.config.get_text_config().num_hidden_layers))
    config = replace(config, linears=linears, layers=None if every else numbers)
    return Pretrained(base, tokenizer, config, tensors, source, has_sketches=False)


def save_released(model: AttachedGenerators, folder: str | Path, base_name: str | None = None) -> None:
    """Write a generator in the authors' layout; `GenerativeAdapter.from_pretrained` and the released code read it.

    The format has no damping and no sketch. The released code uses neither, so if the damping does not matter it makes
    the same adapters up to its random sketch.

    Args:
        model: the generator.
        folder: receives `adapter_config.json` and `adapter_model.safetensors`; other files in it stay.
        base_name: name or path of the base model to record, if not the one that it was loaded from.

    Raises:
        InputError: the released code can't compute what this generator does (see the message), or `folder` is a
            file.
        OSError: it could not be written; existing files are unchanged.
    """
    _check_expressible(model)
    tensors = {}
    for name in model.adapted_names:
        prefix, number, linear = _split(name)
        for part, parameter in _PARTS.items():
            tensor = getattr(model.generator(name), parameter).detach()
            tensor = tensor.mT if parameter == _TRANSPOSED else tensor
            tensors[f"base_model.model.{prefix}.{number}.base_layer.{linear}.{part}.weight"] = tensor
    base_name = model.base.config.name_or_path if base_name is None else base_name
    with replacing_folder(Path(folder)) as temporary:
        write_plain_tensors(temporary / WEIGHTS_FILE, tensors)
        (temporary / CONFIG_FILE).write_text(json.dumps(_config(model.config, base_name), indent=2) + "\n")


def _read_config(path: Path, damping: float, seed: int) -> tuple[GeneratorConfig, str]:
    """The settings, except for which layers are adapted, and the name of the base model."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path} is damaged: it is not a JSON object")
    if values.get("peft_type") != "FASTLORA":
        raise FormatError(
            f"{path} must be of a released generator (FASTLORA), but it is of {values.get('peft_type')!r}"
        )
    size, rank, window = (entry(path, values, f"fastlora_{name}", int) for name in ("r", "max_rank", "window"))
    norm = entry(path, values, "fastlora_norm", str)
    if norm not in _NORMS:
        raise FormatError(f"{path} asks for the norm {norm!r}; supported are {', '.join(_NORMS)}")
    if values.get("fastlora_inter_size") not in (None, size):
        raise FormatError(f"{path}: fastlora_inter_size must be fastlora_r ({size}), but it is another size")
    if values.get("lora_r"):
        raise FormatError(f"{path}: lora_r must be 0; a static LoRA in addition to the generator is not supported")
    try:
        config = GeneratorConfig(
            state_size=size,
            rank=rank,
            scale=entry(path, values, "fastlora_alpha", float) / max(size, 1),
            chunk_size=window,
            norm=_NORMS[norm],
            damping=damping,
            seed=seed,
            sketch_side="output",
        )
    except InputError as error:
        raise FormatError(f"{path} can't be used: {error}") from error
    return config, entry(path, values, "base_model_name_or_path", str)


def _own_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under this library's names, `<adapted layer>.<parameter>`."""
    own = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match["part"] not in _PARTS:
            raise FormatError(f"{path} holds {name}, which is not part of a released generator")
        parameter = _PARTS[match["part"]]
        layer = f"{match['layers']}.{match['number']}.{match['linear']}"
        own[f"{layer}.{parameter}"] = tensor.mT if parameter == _TRANSPOSED and tensor.dim() == 2 else tensor
    return own


def _sites(path: Path, tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The decoder layers, and the linear layers in each of them, that the tensors belong to."""
    sites = {_split(name.rpartition(".")[0])[1:] for name in tensors}
    numbers, linears = tuple(sorted({site[0] for site in sites})), tuple(sorted({site[1] for site in sites}))
    if not sites or len(sites) != len(numbers) * len(linears) or len(tensors) != len(_PARTS) * len(sites):
        raise FormatError(f"{path} is damaged: it must hold {', '.join(_PARTS)} of the same linear layers everywhere")
    return numbers, linears


def _check_sizes(path: Path, config: GeneratorConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check sizes before generators of these sizes are made: a damaged file may name sizes that fit no memory."""
    for name, tensor in tensors.items():
        if name.endswith(".input_map") and tensor.shape[:1] != (config.state_size,):
            raise FormatError(f"{path} does not fit its settings: {name} must have {config.state_size} rows")


def _check_expressible(model: AttachedGenerators) -> None:
    config = model.config
    count = model.base.config.get_text_config().num_hidden_layers
    if config.layers is not None and sorted(config.layers) != list(range(count)):
        raise InputError("the released code adapts all decoder layers, but this generator adapts some of them")
    if not all(re.match(r"(?:model\.)*layers\.\d+\.", name) for name in model.adapted_names):
        raise InputError(
            f"the released code finds layers named model.layers, but this model has {model.adapted_names[0]}"
        )
    if config.norm == "polar" and (config.sketch_side != "output" or config.power_iterations != 1):
        raise InputError(
            'the released code computes with sketch_side="output" and power_iterations=1, but this generator was made '
            f"with {config.sketch_side!r} and {config.power_iterations}"
        )
    if config.static_rank:
        raise InputError(f"the released code has no static term, but static_rank is {config.static_rank}")
    for name in ("token_weights", "delta_rule"):
        if getattr(config, name):
            raise InputError(f"the released code has no {name}, but these generators have")


def _split(name: str) -> tuple[str, int, str]:
    """Split `model.layers.3.self_attn.o_proj` into `model.layers`, 3 and `self_attn.o_proj`."""
    match = re.fullmatch(r"((?:model\.)*layers)\.(\d+)\.(.+)", name)
    assert match is not None, name
    return match[1], int(match[2]), match[3]


def _config(config: GeneratorConfig, base_name: str) -> dict[str, Any]:
    """All fields of the released code's configuration; fields that we do not set have its defaults."""
    alpha = config.adapter_scale * config.state_size
    return {
        "peft_type": "FASTLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "fastlora_r": config.state_size,
        "fastlora_inter_size": config.state_size,
        "fastlora_max_rank": config.rank,
        "fastlora_alpha": round(alpha) if math.isclose(alpha, round(alpha)) else alpha,
        "fastlora_window": config.chunk_size,
        "fastlora_norm": next(theirs for theirs, ours in _NORMS.items() if ours == config.norm),
        "fastlora_merge": "pre-norm-sum",
        "fastlora_arch": "aassbb",
        "fastlora_init": "random",
        "fastlora_dropout": 0.0,
        "fastlora_attn_len": 8192,
        "fastlora_gist_len": 0,
        "fastlora_param": list(config.linears),
        "fastlora_training_attention_mask": None,
        "target_modules": list(config.linears),
        "lora_r": 0,
        "lora_alpha": 0,
        "lora_dropout": 0.0,
        "lora_param": None,
        "bias": "none",
    }
