"""Floating-point operations of a training step, from shapes.

The matrix products of `gakernels.cost.flops` (docs/evaluation.md), forward and backward. The base is frozen: its
backward computes only gradients of activations, from the first adapted linear layers up. The first window of a segment
sees no adapter and has no backward, unless the generators have a static term.
"""

from __future__ import annotations

from dataclasses import dataclass

from gakernels.cost import flops
from gakernels.cost.flops import Flops
from gakernels.cost.shapes import ModelShape
from gakernels.model.config import GeneratorConfig


@dataclass(frozen=True)
class StepFlops:
    """Operations of the forward and of the backward pass."""

    forward: Flops
    backward: Flops

    @property
    def total(self) -> int:
        """Forward and backward together."""
        return self.forward.total + self.backward.total

    def __mul__(self, times: int) -> StepFlops:
        return StepFlops(self.forward * times, self.backward * times)


def pretraining_flops(
    shape: ModelShape, config: GeneratorConfig, chunks: int, window_tokens: int, plain: bool = False, slices: int = 1
) -> StepFlops:
    """Operations for a segment of T chunks of M tokens and its reconstruction windows, `slices` for each of T adapters
    (`model.window_losses.pretraining_windows`).

    With `plain` the first chunk carries a loss too. The backward of the norm is counted as twice its forward, which is
    slightly too much; everything else is exact.

    Raises:
        InputError: the model does not have the layers that the generators adapt.
    """
    alone = chunks > 1 and not config.static_rank  # the first window runs alone, without adapter and graph
    windows = (1 + slices) * chunks
    in_graph = windows - 1 if alone else windows
    predicted = (windows - 1 + plain) * (window_tokens - 1)
    forward = flops.decoder(shape, window_tokens) * windows + flops.head(shape, predicted)
    low_rank = flops.low_rank_products(shape, config, window_tokens)
    forward += _with_static_term(low_rank, config) * in_graph
    forward += flops.states(shape, config, window_tokens) * chunks
    adapters = chunks - (slices == 0)  # then nothing uses the adapter of the last chunk
    made = (flops.norm(shape, config) + flops.expansion(shape, config)) * adapters
    through = flops.lora_training_pass(shape, config, window_tokens)
    once = flops.decoder(shape, window_tokens) + flops.head(shape, window_tokens)
    backward = Flops(
        linear=(through.linear - once.linear) * in_graph,
        attention=(through.attention - once.attention) * in_graph,
        head=flops.head(shape, predicted).head,
        adapter=_with_static_term(Flops(adapter=through.adapter - low_rank.adapter), config).adapter * in_graph,
        generator=_states_backward(shape, config, chunks, window_tokens, alone)
        + 2 * made.generator
        - _identity_gradients(shape, config) * adapters,
    )
    return StepFlops(forward + made, backward)


def _with_static_term(products: Flops, config: GeneratorConfig) -> Flops:
    """Low-rank products of the generated factors and of the static ones."""
    rank = flops.adapter_rank(config)
    return Flops(adapter=products.adapter * (rank + config.static_rank) // rank)


def _states_backward(shape: ModelShape, config: GeneratorConfig, chunks: int, tokens: int, alone: bool) -> int:
    """Gradients of both projections, of A2 and B1, and of the hidden states, except in the first decoder layer and in a
    window without a graph."""
    layers, linears = flops.adapted_layers(shape, config), len(flops.adapted_linears(shape, config))
    size, hidden = config.state_size, shape.hidden
    projection, gate = 4 * hidden * size * tokens, 2 * hidden * tokens * flops.has_gate(config)
    update = flops.delta_products(size, tokens, 5, 5) if config.delta_rule else 4 * size * size * tokens
    windows = chunks - 1 if alone else chunks
    with_input = windows * sum(layer > layers[0] for layer in layers)
    if config.token_weights:  # which multiply the hidden states
        with_input = chunks * len(layers)
    return linears * (len(layers) * chunks * (update + projection + gate) + with_input * projection)


def _identity_gradients(shape: ModelShape, config: GeneratorConfig) -> int:
    """The gradients that need not be computed with the Frobenius norm, where V is the identity."""
    if config.norm != "frobenius":
        return 0
    inputs = sum(linear.inputs for linear in flops.adapted_linears(shape, config))
    return len(flops.adapted_layers(shape, config)) * 2 * config.state_size**2 * inputs
