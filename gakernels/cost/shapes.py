"""The sizes of a base model that costs depend on, taken from a transformers configuration without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gakernels.errors import InputError
from gakernels.model.attachment import cache_name, decoder_layers, decoder_of


@dataclass(frozen=True)
class LinearShape:
    """A linear layer inside a decoder layer: its name there, d_in and d_out."""

    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Numbers in its weight matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder-only model whose decoder layers all have the same shapes.

    Attributes:
        name: name shown in tables.
        hidden: d_h.
        vocabulary: rows of the head.
        heads, kv_heads, head_dim: sizes of attention.
        stages: the linear layers of one decoder layer in the order in which they run; those that read the same input
            form a stage. Attention lies between the first stage and the second.
        windows: for each decoder layer, the number of tokens that attention reaches back, the current one included;
            None for all.
        parameters: parameters of the whole model; shared ones count once.
    """

    name: str
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    stages: tuple[tuple[LinearShape, ...], ...]
    windows: tuple[int | None, ...]
    parameters: int

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.windows)

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """The linear layers of one decoder layer."""
        return tuple(linear for stage in self.stages for linear in stage)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, name: str = "") -> ModelShape:
        """The shape of the model that a transformers configuration describes; allocates no weights.

        Raises:
            InputError: there is no such causal language model, its decoder layers differ from each other, or they have
                weights or attention of a kind that the formulas do not cover (experts, recurrent layers, compressed
                keys).
        """
        with FakeTensorMode(allow_non_fake_inputs=True):
            with _refusing("config must be that of a causal language model"):
                base = AutoModelForCausalLM.from_config(config)
            return _shape_of(base, name or config.name_or_path or config.model_type)


def llama_shape(
    name: str, *, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocabulary: int, head_dim: int = 128
) -> ModelShape:
    """The shape of a Llama-like model (Llama, Mistral, ...) with full attention and a head of its own."""
    width, kv_width = heads * head_dim, kv_heads * head_dim
    stages = (
        (
            LinearShape("self_attn.q_proj", hidden, width),
            LinearShape("self_attn.k_proj", hidden, kv_width),
            LinearShape("self_attn.v_proj", hidden, kv_width),
        ),
        (LinearShape("self_attn.o_proj", width, hidden),),
        (LinearShape("mlp.gate_proj", hidden, ffn), LinearShape("mlp.up_proj", hidden, ffn)),
        (LinearShape("mlp.down_proj", ffn, hidden),),
    )
    in_a_layer = sum(linear.weights for stage in stages for linear in stage) + 2 * hidden
    parameters = layers * in_a_layer + 2 * vocabulary * hidden + hidden
    return ModelShape(name, hidden, vocabulary, heads, kv_heads, head_dim, stages, (None,) * layers, parameters)


def _tied(shape: ModelShape) -> ModelShape:
    """The shape with the head tied to the embedding."""
    return replace(shape, parameters=shape.parameters - shape.vocabulary * shape.hidden)


SHAPES = {
    shape.name: shape
    for shape in (
        _tied(
            llama_shape(
                "smollm2-135m", hidden=576, ffn=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152, head_dim=64
            )
        ),
        _tied(
            llama_shape(
                "llama3.2-1b", hidden=2048, ffn=8192, layers=16, heads=32, kv_heads=8, vocabulary=128256, head_dim=64
            )
        ),
        llama_shape("mistral-7b", hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8, vocabulary=32000),
        llama_shape("llama2-7b", hidden=4096, ffn=11008, layers=32, heads=32, kv_heads=32, vocabulary=32000),
        llama_shape("llama3-8b", hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256),
        llama_shape("llama3-70b", hidden=8192, ffn=28672, layers=80, heads=64, kv_heads=8, vocabulary=128256),
    )
}


@contextmanager
def _refusing(expected: str) -> Iterator[None]:
    """Report as an `InputError` that transformers can't make, or run, the model of a configuration."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{expected}, but it is not: {reason}") from error


def _shape_of(base: PreTrainedModel, name: str) -> ModelShape:
    settings = base.config.get_text_config()
    layers = decoder_layers(base)[1]
    per_layer = [_linears(layer) for layer in layers]
    if any(linears != per_layer[0] for linears in per_layer):
        raise InputError(f"the decoder layers of {name} must all have the same linear layers, but they differ")
    heads = settings.num_attention_heads
    stages, keys, values = _one_token(base, layers[0], per_layer[0])
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    if len(stages) < 2 or stages[1][0].inputs != heads * head_dim or keys.shape != values.shape:
        raise InputError(
            f"{name} must have attention whose {heads} heads are all of the size of a key and of a value, but they are "
            f"of other sizes: keys {tuple(keys.shape[1:])}, values {tuple(values.shape[1:])}"
        )
    vocabulary = base.get_output_embeddings().weight.shape[0]
    parameters = sum(parameter.numel() for parameter in base.parameters())
    windows = _windows(settings, name)
    return ModelShape(name, settings.hidden_size, vocabulary, heads, kv_heads, head_dim, stages, windows, parameters)


def _linears(layer: nn.Module) -> dict[str, LinearShape]:
    """The linear layers of a decoder layer by name."""
    linears = {
        name: LinearShape(name, module.in_features, module.out_features)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1 and name.rpartition(".")[0] not in linears:
            raise InputError(
                f"the decoder layers must have their matrices in linear layers, but {name} is of another kind, and its "
                "cost can't be computed from its shape"
            )
    return linears


def _one_token(
    base: PreTrainedModel, layer: nn.Module, linears: dict[str, LinearShape]
) -> tuple[tuple[tuple[LinearShape, ...], ...], Tensor, Tensor]:
    """Run one (fake) token through the model: the linear layers of a decoder layer, grouped by the input they read, and
    the keys and values (1, heads, 1, size) that the layer caches."""
    inputs: list[Tensor] = []
    stages: dict[int, list[LinearShape]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            number = next((n for n, tensor in enumerate(inputs) if tensor is args[0]), len(inputs))
            if number == len(inputs):
                inputs.append(args[0])
            stages.setdefault(number, []).append(linears[name])

        return hook

    for name in linears:
        layer.get_submodule(name).register_forward_pre_hook(note(name))
    with torch.no_grad(), _refusing("config must be that of a model that reads a token and keeps its keys and values"):
        decoder = decoder_of(base)
        output = decoder(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
        cached = output[cache_name(decoder)].layers[0]
    return tuple(tuple(stage) for stage in stages.values()), cached.keys, cached.values


def _windows(settings: PreTrainedConfig, name: str) -> tuple[int | None, ...]:
    """How far back attention reaches, for each decoder layer."""
    window = getattr(settings, "sliding_window", None)
    if not getattr(settings, "use_sliding_window", True):
        window = None
    kind = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(settings, "layer_types", None) or [kind] * settings.num_hidden_layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise InputError(f"the layers of {name} must be of full or sliding attention, but some are {unknown.pop()!r}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
