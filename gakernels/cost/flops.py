"""Floating-point operations of matrix products, from shapes (docs/evaluation.md).

A product of (m, k) and (k, n) is 2 m k n operations. Attention counts the query-key pairs that the causal mask
(and a sliding window) allows. Not counted: sums, norms, activations, softmax, and the r x r factorisations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

from gakernels.cost.shapes import LinearShape, ModelShape
from gakernels.errors import InputError
from gakernels.model.config import GeneratorConfig
from gakernels.ops.delta_state.eager import BLOCK


@dataclass(frozen=True)
class Flops:
    """Numbers of operations by part.

    Attributes:
        linear: linear layers of the decoder layers.
        attention: products of queries with keys, and of attention weights with values.
        head: logits.
        adapter: low-rank products added to the adapted linear layers.
        generator: from hidden states to the adapter, and merging it.
    """

    linear: int = 0
    attention: int = 0
    head: int = 0
    adapter: int = 0
    generator: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: int) -> Flops:
        return Flops(*(getattr(self, field.name) * times for field in fields(self)))

    def to_dict(self) -> dict[str, int]:
        """The operations by part, and their `total`."""
        return {**asdict(self), "total": self.total}


# The base model


def attention_pairs(tokens: int, before: int = 0, window: int | None = None) -> int:
    """Query-key pairs when `tokens` new tokens follow `before` earlier ones: each sees itself and all tokens before."""
    if window is None:
        return tokens * before + tokens * (tokens + 1) // 2
    unlimited = min(max(window - before, 0), tokens)
    return attention_pairs(unlimited, before) + (tokens - unlimited) * window


def decoder(shape: ModelShape, tokens: int, before: int = 0) -> Flops:
    """All decoder layers over new tokens; keys and values of the earlier tokens are already cached."""
    linear = shape.layers * sum(2 * layer.weights for layer in shape.linears) * tokens
    return Flops(linear=linear, attention=sum(_attention(shape, n, tokens, before) for n in range(shape.layers)))


def head(shape: ModelShape, tokens: int) -> Flops:
    """The logits of this many tokens."""
    return Flops(head=2 * shape.hidden * shape.vocabulary * tokens)


def generation(shape: ModelShape, prompt: int, new: int, before: int = 0) -> Flops:
    """A prompt and the tokens generated after it, with a key-value cache.

    Logits are formed for the last token of the prompt and for each new token but the last, which is not read.
    """
    return decoder(shape, prompt + new - 1, before) + head(shape, new)


def _attention(shape: ModelShape, layer: int, tokens: int, before: int = 0) -> int:
    return 4 * shape.heads * shape.head_dim * attention_pairs(tokens, before, shape.windows[layer])


# The generator and its adapter


def adapted_layers(shape: ModelShape, config: GeneratorConfig) -> list[int]:
    """The numbers of the decoder layers that carry adapters, in order.

    Raises:
        InputError: the model has no layer with one of the numbers.
    """
    numbers = list(range(shape.layers)) if config.layers is None else sorted(config.layers)
    if not 0 <= numbers[0] <= numbers[-1] < shape.layers:
        raise InputError(f"layers must be between 0 and {shape.layers - 1}, but they are {config.layers}")
    return numbers


def adapted_linears(shape: ModelShape, config: GeneratorConfig) -> list[LinearShape]:
    """The linear layers of a decoder layer that carry adapters.

    Raises:
        InputError: the decoder layers have no linear layer of one of the names.
    """
    for wanted in config.linears:
        if not any(_matches(linear.name, wanted) for linear in shape.linears):
            names = ", ".join(linear.name for linear in shape.linears)
            raise InputError(f"linears: no linear layer is named {wanted!r}; there are {names}")
    return [linear for linear in shape.linears if any(_matches(linear.name, wanted) for wanted in config.linears)]


def adapter_rank(config: GeneratorConfig) -> int:
    """The rank of the factors: r, or d_r with the Frobenius norm."""
    return config.state_size if config.norm == "frobenius" else config.rank


def low_rank_products(shape: ModelShape, config: GeneratorConfig, tokens: int) -> Flops:
    """lora_B (lora_A x) of every adapted linear layer."""
    rank = adapter_rank(config)
    each = sum(2 * rank * (linear.inputs + linear.outputs) for linear in adapted_linears(shape, config))
    return Flops(adapter=len(adapted_layers(shape, config)) * each * tokens)


def compact_products(shape: ModelShape, config: GeneratorConfig, tokens: int) -> Flops:
    """A1 (U (V^T (B2 x))) of every adapted linear layer, for an adapter kept as U and V."""
    size = config.state_size
    each = sum(
        2 * size * (linear.inputs + 2 * config.rank + linear.outputs) for linear in adapted_linears(shape, config)
    )
    return Flops(adapter=len(adapted_layers(shape, config)) * each * tokens)


def states(shape: ModelShape, config: GeneratorConfig, tokens: int) -> Flops:
    """Both projections of the hidden states and the sum of their outer products, for every adapted linear layer; the
    weights of the tokens; under the delta rule, what the tokens of a chunk write (`gakernels.ops.delta_state`).
    """
    size, sites = config.state_size, _sites(shape, config)
    update = delta_products(size, tokens, 2, 2) if config.delta_rule else 2 * size * size * tokens
    return Flops(generator=sites * (shape.hidden * (4 * size + 2 * has_gate(config)) * tokens + update))


def has_gate(config: GeneratorConfig) -> bool:
    """Whether tokens have learned weights."""
    return config.token_weights or config.delta_rule


def delta_products(size: int, tokens: int, with_state: int, with_tokens: int) -> int:
    """That many products of M tokens with the state (M d_r^2) and with each other (M^2 d_r), and the inverse."""
    padded = BLOCK
    while padded < tokens:
        padded *= 2
    joined = (BLOCK << level for level in range((padded // BLOCK).bit_length() - 1))
    inverse = sum(2 * padded * half**2 for half in joined)
    return 2 * tokens * size * (with_state * size + with_tokens * tokens) + inverse


def norm(shape: ModelShape, config: GeneratorConfig) -> Flops:
    """U and V of one state per adapted linear layer: 2 + 2p steps of the damped polar factor (docs/numerics.md).

    A step is a product with the state, a Gram matrix and a product with its r x r root; the last root is one more.
    """
    if config.norm == "frobenius":
        return Flops()
    size, rank, steps = config.state_size, config.rank, 2 + 2 * config.power_iterations
    each = steps * (2 * size * size * rank + 4 * size * rank * rank) + 2 * rank**3
    return Flops(generator=_sites(shape, config) * each)


def expansion(shape: ModelShape, config: GeneratorConfig) -> Flops:
    """lora_A = V^T B2 and lora_B = A1 U of one state per adapted linear layer."""
    return Flops(generator=low_rank_products(shape, config, config.state_size).adapter)


def merging(shape: ModelShape, config: GeneratorConfig) -> Flops:
    """lora_B lora_A of every adapted linear layer."""
    each = sum(2 * adapter_rank(config) * linear.weights for linear in adapted_linears(shape, config))
    return Flops(generator=len(adapted_layers(shape, config)) * each)


def context_states(shape: ModelShape, config: GeneratorConfig, tokens: int) -> Flops:
    """Reading a context into its states, as `GenerativeAdapter.states` does.

    The context is cut into even chunks of at most `chunk_size` tokens, each encoded with the adapter of those before.
    All windows of a pass go through the low-rank products, the first chunk with zeros.
    """
    chunks, length = even_chunks(tokens, config.chunk_size)
    adapted = chunks if chunks > 1 else 0  # an only chunk goes through without any adapter
    read = (decoder(shape, length) + states(shape, config, length)) * chunks
    made = (norm(shape, config) + expansion(shape, config)) * (chunks - 1)
    return read + made + low_rank_products(shape, config, length) * adapted


def even_chunks(tokens: int, chunk_size: int) -> tuple[int, int]:
    """Number and (padded) length of the chunks that `gakernels.model.windows.split_evenly` makes."""
    length = math.ceil(tokens / math.ceil(tokens / chunk_size))
    return math.ceil(tokens / length), length


def _sites(shape: ModelShape, config: GeneratorConfig) -> int:
    return len(adapted_layers(shape, config)) * len(adapted_linears(shape, config))


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


# Training


def full_training_pass(shape: ModelShape, tokens: int) -> Flops:
    """Forward and backward of one sequence, training every weight: each product has two in the backward."""
    return (decoder(shape, tokens) + head(shape, tokens)) * 3


def lora_training_pass(shape: ModelShape, config: GeneratorConfig, tokens: int) -> Flops:
    """Forward and backward of one sequence, training only LoRA factors.

    The gradients of activations go down to the first adapted linear layers and no further; frozen weights have no
    gradients. Attention is not recomputed in the backward.
    """
    forward = decoder(shape, tokens) + head(shape, tokens) + low_rank_products(shape, config, tokens)
    backward = Flops(
        linear=sum(2 * linear.weights * tokens for linear in _above_first_adapted(shape, config)),
        attention=sum(2 * _attention(shape, layer, tokens) for layer in _attention_above(shape, config)),
        head=head(shape, tokens).head,
        adapter=2 * low_rank_products(shape, config, tokens).adapter - _first_adapter_inputs(shape, config, tokens),
    )
    return forward + backward


def _first_adapted(shape: ModelShape, config: GeneratorConfig) -> tuple[int, int]:
    """Index of the first decoder layer with an adapter, and of its first stage with one."""
    adapted = adapted_linears(shape, config)
    stage = next(n for n, stage in enumerate(shape.stages) if any(linear in adapted for linear in stage))
    return adapted_layers(shape, config)[0], stage


def _above_first_adapted(shape: ModelShape, config: GeneratorConfig) -> Iterator[LinearShape]:
    """Every linear layer whose input depends on an adapter."""
    first, first_stage = _first_adapted(shape, config)
    for layer in range(first, shape.layers):
        for stage in shape.stages[first_stage + 1 if layer == first else 0 :]:
            yield from stage


def _attention_above(shape: ModelShape, config: GeneratorConfig) -> range:
    """The decoder layers whose attention depends on an adapter."""
    first, first_stage = _first_adapted(shape, config)
    return range(first if first_stage == 0 else first + 1, shape.layers)


def _first_adapter_inputs(shape: ModelShape, config: GeneratorConfig, tokens: int) -> int:
    """The cost of the gradients of the inputs of the first adapted linear layers, which are not needed."""
    first_stage, adapted = shape.stages[_first_adapted(shape, config)[1]], adapted_linears(shape, config)
    return sum(2 * adapter_rank(config) * linear.inputs * tokens for linear in first_stage if linear in adapted)
