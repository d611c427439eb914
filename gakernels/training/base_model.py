"""The base model of a run: its part of a recipe, loading it, and its sizes without loading it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import PlainValidator
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gakernels.cost.shapes import SHAPES, ModelShape, llama_shape
from gakernels.errors import InputError, first_line
from gakernels.model import load_base
from gakernels.model.base_model import model_source
from gakernels.model.quantized_base import QUANTIZATIONS, quantize_base
from gakernels.settings import Count, Flag, PathText, one_of, settings, shown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@settings
class LlamaSizes:
    """The sizes of a Llama-like model, named as in its configuration.

    Attributes:
        hidden: d_h.
        ffn: width of the feed-forward part.
        layers: number of decoder layers.
        heads: attention heads.
        kv_heads: heads of keys and values.
        head_dim: size of a head.
        vocabulary: rows of the embedding.
        tied: whether the output head is the embedding.
    """

    hidden: Count
    ffn: Count
    layers: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    vocabulary: Count
    tied: Flag = False

    def shape(self, name: str) -> ModelShape:
        """The shape of the model."""
        sizes = {key: value for key, value in vars(self).items() if key != "tied"}
        shape = llama_shape(name, **sizes)
        shared = self.vocabulary * self.hidden if self.tied else 0
        return replace(shape, parameters=shape.parameters - shared)


def _shape(value: object) -> object:
    if isinstance(value, Mapping):
        try:
            return LlamaSizes(**value)
        except InputError as error:
            raise InputError(f"model.shape.{error}") from error
    if value is None or isinstance(value, LlamaSizes) or (isinstance(value, str) and value in SHAPES):
        return value
    raise ValueError(f"must be one of {', '.join(SHAPES)}, or sizes, but it is {shown(value)}")


@settings
class BaseConfig:
    """Which base model.

    Attributes:
        name: a folder or a hub name; for a plan, a folder with only a config.json suffices.
        dtype: of its weights: `float32`, `bfloat16` or `float16`; None for the one that they are stored in.
        quantization: of its linear layers: `fp8`, `int8` or `nf4`; None leaves them as they are.
        shape: its sizes, for a plan without the model: a name from `cost.shapes.SHAPES`, or the
            sizes themselves. A run ignores them.

    Raises:
        InputError: a value is not one of those.
    """

    name: PathText
    dtype: Annotated[str, one_of(DTYPES)] | None = None
    quantization: Annotated[str, one_of(QUANTIZATIONS)] | None = None
    shape: Annotated[str | LlamaSizes | None, PlainValidator(_shape)] = None


def load_base_model(
    config: BaseConfig, device: torch.device | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The base model on a device, and its tokenizer if it has one.

    Raises:
        InputError: there is no such model, one of its files is damaged, or the tokenizer belongs to another model.
        BackendError: the device can't compute with weights of this quantization.
    """
    base, tokenizer = load_base(config.name, dtype="auto" if config.dtype is None else DTYPES[config.dtype])
    if tokenizer is not None:
        check_tokenizer(base, tokenizer)
    base = base.to(device)  # type: ignore[arg-type]
    return quantize_base(base, config.quantization) if config.quantization else base, tokenizer


def check_tokenizer(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer fits its model. Tokens added to it count only if a text contains them (`check_tokens`).

    Raises:
        InputError: the vocabulary of the tokenizer is larger than the base model's embedding.
    """
    rows = int(base.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    added = tokenizer.get_added_vocab()
    largest = max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=0)
    if largest >= rows:
        raise InputError(
            f"the tokenizer of {base.config.name_or_path} must be that of its model, but it gives token ids up to "
            f"{largest}, and the embedding has {rows} rows"
        )


def base_shape(config: BaseConfig) -> ModelShape:
    """The sizes that a recipe names, or else those of the model's configuration; no weights are loaded.

    Raises:
        InputError: there is no such configuration, or the costs of such a model don't follow from its shape.
    """
    if isinstance(config.shape, LlamaSizes):
        return config.shape.shape(config.name)
    if config.shape is not None:
        return SHAPES[config.shape]
    return ModelShape.from_config(_configuration(config.name), config.name)


def base_dtype(config: BaseConfig) -> torch.dtype:
    """The dtype of the weights, without loading them; bfloat16 for a model that only has a shape, as most are
    published.

    Raises:
        InputError: the configuration can't be read.
    """
    if config.dtype is not None:
        return DTYPES[config.dtype]
    if config.shape is not None:
        return torch.bfloat16
    dtype = _configuration(config.name).get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _configuration(name: str) -> PreTrainedConfig:
    try:
        values: PreTrainedConfig = AutoConfig.from_pretrained(**model_source(name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"model.name: the configuration of {name!r} can't be read: {first_line(error)} "
            "(model.shape can stand for it in a plan)"
        ) from error
    return values
