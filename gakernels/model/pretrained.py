"""The files of a generator: writing them, and reading what a model is built from."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gakernels.errors import FormatError, InputError
from gakernels.files import entry, read_tensors, write_tensors, write_text
from gakernels.model.attached_generators import AttachedGenerators
from gakernels.model.attachment import unwrapped
from gakernels.model.base_model import layers_fingerprint, load_base, locate, model_fingerprint
from gakernels.model.config import GeneratorConfig

GENERATOR_FILE = "generator.safetensors"


@dataclass(frozen=True)
class Pretrained:
    """A saved generator with its base model.

    Attributes:
        base: the base model, without wrappers.
        tokenizer: its tokenizer, if there is one.
        config: the generator's settings.
        tensors: parameters and sketches by name, as `AttachedGenerators.generator_tensors` returns them.
        source: the file that they come from.
        fingerprints: those accepted for the base model: first the one for new files, then others. Empty: only its own.
        has_sketches: if not, the sketches are drawn from the seed in the settings.
        chat_template: of the conversations that the generator was tuned on, if it was.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    config: GeneratorConfig
    tensors: Mapping[str, Tensor]
    source: Path
    fingerprints: tuple[str, ...] = ()
    has_sketches: bool = True
    chat_template: str | None = None


def save_generator(
    model: AttachedGenerators, folder: Path, base_name: str | None, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """See `GenerativeAdapter.save_pretrained`; `tensors`, if given, are written in place of the model's own."""
    tensors = model.generator_tensors() if tensors is None else tensors
    description = {
        "config": model.config.to_dict(),
        "base_name": model.base.config.name_or_path if base_name is None else base_name,
        "base_fingerprint": model.base_fingerprint(),
        "base_layers_fingerprint": model.base_layers_fingerprint(),
        "generator_fingerprint": model.fingerprint_of(tensors),
        "chat_template": model.chat_template,
    }
    write_tensors(folder / GENERATOR_FILE, "generator", tensors, description)
    write_text(folder / "generator.json", json.dumps(description, indent=2) + "\n")


def read_generator(
    folder: Path,
    base: nn.Module | str | Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    allow_other_base: bool,
    base_options: Mapping[str, Any],
) -> Pretrained:
    """Read what `save_generator` wrote, and its base model; see `GenerativeAdapter.from_pretrained`."""
    path = folder / GENERATOR_FILE
    tensors, description = read_tensors(path, "generator")
    config = _read_config(path, description)
    _check_sketches(path, config, tensors)
    base_name, wanted = (entry(path, description, name, str) for name in ("base_name", "base_fingerprint"))
    if not isinstance(base, nn.Module):
        name = locate(folder, base_name if base is None else str(base))
        base, tokenizer = load_base(name, tokenizer, **base_options)
    base = unwrapped(base)
    template = _read_template(path, description)
    own = model_fingerprint(base)
    if own == wanted:
        return Pretrained(base, tokenizer, config, tensors, path, (own,), chat_template=template)
    layers = entry(path, {"base_layers_fingerprint": "", **description}, "base_layers_fingerprint", str)
    same_layers = layers == layers_fingerprint(base)
    _check_other_base(path, base_name, wanted, own, same_layers, allow_other_base)
    # With the same layers it produces the same adapters as the generator's own base model.
    fingerprints = (wanted, own) if same_layers else (own, wanted)
    return Pretrained(base, tokenizer, config, tensors, path, fingerprints, chat_template=template)


def put_in(model: AttachedGenerators, found: Pretrained) -> None:
    """Load the saved parameters into a new model with these settings.

    Raises:
        FormatError: they do not fit; then the generators have been detached.
    """
    drawn = {} if found.has_sketches else model.generator_tensors()
    sketches = {name: tensor for name, tensor in drawn.items() if name.endswith(".sketch")}
    try:
        model.load_generator_tensors({**sketches, **found.tensors}, str(found.source))
    except FormatError:
        model.detach()
        raise
    model.set_base_fingerprints(found.fingerprints)
    if found.chat_template is not None:
        model.use_chat_template(found.chat_template)


def _check_other_base(path: Path, name: str, wanted: str, own: str, same_layers: bool, allowed: bool) -> None:
    """Handle a base model that a generator was not trained for: warn or raise a FormatError."""
    difference = (
        f"base must be the model that {path} was trained for (fingerprint {wanted}, {name or 'no name'}), but its "
        f"fingerprint is {own}"
    )
    if same_layers:
        warnings.warn(
            f"{difference}; its decoder layers are the same, so adapters fit if only tokens were added", stacklevel=4
        )
    elif allowed:
        warnings.warn(f"{difference}; accepted anyway because of allow_other_base", stacklevel=4)
    else:
        raise FormatError(f"{difference}; allow_other_base (--allow-other-base) accepts it anyway")


def _read_config(path: Path, description: Mapping[str, Any]) -> GeneratorConfig:
    config = entry(path, description, "config", dict)
    try:
        return GeneratorConfig.from_dict(config)
    except InputError as error:
        raise FormatError(f"{path} can't be read: {error}") from error


def _read_template(path: Path, description: Mapping[str, Any]) -> str | None:
    template = description.get("chat_template")  # files of earlier versions have none
    if template is not None and not isinstance(template, str):
        raise FormatError(f"{path} is damaged: chat_template must be a text, but it is {type(template).__name__}")
    return template


def _check_sketches(path: Path, config: GeneratorConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check sizes before generators of these sizes are made: a damaged file may name sizes that fit no memory."""
    sketches = [tensor for name, tensor in tensors.items() if name.endswith(".sketch")]
    if not sketches or any(sketch.shape != (config.state_size, config.rank) for sketch in sketches):
        raise FormatError(f"{path} is damaged: its tensors do not have the sizes that its settings name")
