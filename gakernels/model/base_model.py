"""The base model of a generator: loading it by name, and its fingerprint."""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from gakernels.errors import InputError, first_line
from gakernels.model.attachment import decoder_layers
from gakernels.nn.offloading import offloaded_weight

_REMEMBERED = "_gakernels_fingerprint"
_SAMPLES = 256
_TINY = 2.0**-16  # below it, float16 holds fewer bits than bfloat16


def load_base(
    name: str, tokenizer: PreTrainedTokenizerBase | None = None, tokenizer_name: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A causal language model and its tokenizer, if it has one, from a folder, a GGUF file or the Hugging Face hub.

    A model of text and images is loaded whole; generators attach to its text decoder.

    The weights of a GGUF file (`name.gguf`) are dequantised to the dtype in the options, float32 if there is none. This
    needs the package `gguf`.

    Args:
        name: folder, GGUF file or name of the model.
        tokenizer: the tokenizer, if it is already loaded.
        tokenizer_name: folder or name of the tokenizer, if it is not stored with the model.
        options: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        InputError: there is no model of that name, a file of it is damaged, or it is a PEFT adapter.
    """
    try:
        base: PreTrainedModel = auto_class(_model_type(name, options)).from_pretrained(**model_source(name), **options)
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever transformers raises for a damaged folder, or for a pickle with more than tensors
        raise InputError(f"base model {name!r} can't be loaded: {first_line(error)}") from error
    if getattr(base, "_hf_peft_config_loaded", False):
        raise InputError(
            f"base model {name!r} is a PEFT adapter (adapter_config.json) on top of a base model; merge it first and "
            "name the merged folder: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()"
        )
    if "gguf_file" in model_source(name):
        base = _plain(base, name)
    _keep_soft_cap(base, options)
    if tokenizer is not None:
        return base, tokenizer
    name = tokenizer_name or name
    try:
        return base, AutoTokenizer.from_pretrained(**model_source(name))
    except Exception as error:  # the package tokenizers raises nothing narrower
        if "gguf_file" in model_source(name) or any(Path(name).glob("tokenizer*")):  # it has one, but that is damaged
            raise InputError(f"the tokenizer of {name!r} can't be loaded: {first_line(error)}") from error
        return base, None


def auto_class(model_type: str | None) -> type[Any]:
    """The class of transformers that makes a model of this type; models of text and images may have another."""
    seen = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return (
        AutoModelForImageTextToText
        if seen and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        else AutoModelForCausalLM
    )


def _model_type(name: str, options: Mapping[str, Any]) -> str | None:
    try:
        settings, _ = PreTrainedConfig.get_config_dict(**model_source(name), **options)
    except OSError:  # a PEFT adapter, for example: loading it shows what it is
        return None
    return settings.get("model_type")


def model_source(name: str) -> dict[str, str]:
    """The arguments of transformers' `from_pretrained` that name a model: for a GGUF file, its folder and file name."""
    path = Path(name)
    if path.suffix != ".gguf" or not path.is_file():
        return {"pretrained_model_name_or_path": name}
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _plain(base: PreTrainedModel, name: str) -> PreTrainedModel:
    """Remove the quantisation marks from a model: with them it can't be saved or cast to another dtype."""
    config = copy.deepcopy(base.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=base.dtype)
    plain.load_state_dict(base.state_dict())
    plain.config.name_or_path = name
    return plain.eval()


def _keep_soft_cap(base: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Keep Gemma 2's soft cap of the attention logits, which transformers before 5.21 ignores by default."""
    config = base.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped and config._attn_implementation == "sdpa" and options.get("attn_implementation") is None:
        base.set_attn_implementation("eager")


def layers_fingerprint(base: PreTrainedModel) -> str:
    """Fingerprint of the decoder layers alone."""
    return model_fingerprint(base, decoder_layers(base)[0])


def locate(folder: Path, name: str) -> str:
    """Resolve a relative path from the generator's folder if it exists there."""
    beside = folder / name
    return str(beside) if name and beside.exists() else name


def model_fingerprint(model: nn.Module, under: str = "") -> str:
    """Fingerprint of a base model: names and shapes of all parameters, and evenly spaced values of each.

    Values are rounded to bfloat16 first, tiny ones to zero, so a model has the same fingerprint in float32 and
    bfloat16, and also in float16 if its files hold bfloat16 numbers. Only a sample of each tensor is read, which takes
    a moment for a model of any size. A model quantised by this library keeps the fingerprint that it had before.

    Args:
        model: the base model; weights that accelerate has offloaded are read from where they are.
        under: name of a module; if given, only its parameters count.
    """
    remembered: dict[str, str] = getattr(model, _REMEMBERED, {})
    if under in remembered:
        return remembered[under]
    digest = hashlib.sha256()
    named = ((name, value) for name, value in _parameters(model) if not under or name.startswith(f"{under}."))
    tensors = [part for name, value in named for part in _tensors(name, value)]
    for name, parameter in sorted(tensors, key=lambda item: item[0]):
        flat = parameter.reshape(-1)
        count = min(_SAMPLES, flat.numel())
        positions = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
        values = flat[positions].bfloat16()
        values = torch.where(values.abs() < _TINY, torch.zeros_like(values), values)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters with their names, each once, with the values that a forward pass uses."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        value = offloaded_weight(modules[path], attribute) if parameter.is_meta else parameter.detach()
        if value is None:
            raise InputError(f"base must have values for all of its parameters, but {name} is on the device meta")
        yield name, value


def _tensors(name: str, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """A parameter with its name; for a tensor subclass that packs numbers, the tensors inside it."""
    if type(parameter).__module__.partition(".")[0] == "torch" or not hasattr(parameter, "__tensor_flatten__"):
        return [(name, parameter)]
    inside, _ = parameter.__tensor_flatten__()
    return [part for key in inside for part in _tensors(f"{name}.{key}", getattr(parameter, key))]


def remember_fingerprint(model: nn.Module, *under: str) -> None:
    """Make `model_fingerprint` return the current fingerprints from now on, even if the parameters change: of the whole
    model, and of the modules of these names."""
    setattr(model, _REMEMBERED, {name: model_fingerprint(model, name) for name in ("", *under)})
