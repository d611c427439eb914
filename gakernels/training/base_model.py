"""The base model of a run: what a recipe says about it, loading it, and its sizes without loading it."""

from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from gakernels.cost.shapes import SHAPES, ModelShape, llama_shape
from gakernels.errors import InputError, first_line
from gakernels.model import load_base
from gakernels.model.quantized_base import QUANTIZATIONS, quantize_base
from gakernels.paths import expand_fields

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LlamaSizes:
    """The sizes of a Llama-like model, named as in its configuration.

    Attributes:
        hidden: d_h.
        ffn: width of the feed-forward part.
        layers: decoder layers.
        heads: of attention.
        kv_heads: of keys and values.
        head_dim: size of a head.
        vocabulary: rows of the embedding.
        tied: whether the head is the embedding.
    """

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    def shape(self, name: str) -> ModelShape:
        """The shape of the model."""
        sizes = {key: value for key, value in vars(self).items() if key != "tied"}
        shape = llama_shape(name, **sizes)
        shared = self.vocabulary * self.hidden if self.tied else 0
        return replace(shape, parameters=shape.parameters - shared)


@dataclass(frozen=True)
class BaseConfig:
    """Which base model.

    Attributes:
        name: a folder or a hub name; for a plan a folder with only a config.json will do.
        dtype: of its weights: `float32`, `bfloat16` or `float16`.
        quantization: of its linear layers: `fp8`, `int8` or `nf4`; None leaves them as they are.
        shape: its sizes, for a plan where the model is not at hand: a name out of `cost.shapes.SHAPES`, or the
            sizes themselves. A run does not look at them.

    Raises:
        InputError: a value is none of those.
    """

    name: str
    dtype: str = "float32"
    quantization: str | None = None
    shape: str | LlamaSizes | None = None

    def __post_init__(self) -> None:
        expand_fields(self, "name")
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype must be one of {', '.join(DTYPES)}, but it is {self.dtype!r}")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise InputError(
                f"model.quantization must be one of {', '.join(QUANTIZATIONS)}, but it is {self.quantization!r}"
            )
        if isinstance(self.shape, str) and self.shape not in SHAPES:
            raise InputError(f"model.shape must be one of {', '.join(SHAPES)}, but it is {self.shape!r}")


def load_base_model(
    config: BaseConfig, device: torch.device | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The base model on a device, and its tokenizer if it has one.

    Raises:
        InputError: there is no such model, a file of it is damaged, or the tokenizer is that of another model.
        BackendError: the device can't compute with weights that are quantised so.
    """
    base, tokenizer = load_base(config.name, dtype=DTYPES[config.dtype])
    if tokenizer is not None:
        check_tokenizer(base, tokenizer)
    base = base.to(device)  # type: ignore[arg-type]
    return quantize_base(base, config.quantization) if config.quantization else base, tokenizer


def check_tokenizer(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether a tokenizer fits its model. Tokens that were added to it count where a text has them (`check_tokens`).

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
        InputError: there is no such configuration, or it is of a kind whose costs can't be told from its shape.
    """
    if isinstance(config.shape, LlamaSizes):
        return config.shape.shape(config.name)
    if config.shape is not None:
        return SHAPES[config.shape]
    try:
        values = AutoConfig.from_pretrained(config.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"model.name: the configuration of {config.name!r} can't be read: {first_line(error)} "
            "(model.shape can stand for it in a plan)"
        ) from error
    return ModelShape.from_config(values, config.name)
