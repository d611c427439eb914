"""The bytes of a training step, computed from shapes for each part and moment (docs/training.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from gakernels.cost.flops import adapted_layers, adapted_linears, adapter_rank
from gakernels.cost.shapes import LinearShape, ModelShape
from gakernels.model.config import GeneratorConfig
from gakernels.model.windows import only_first_is_plain
from gakernels.nn.token_loss import LOGITS_IN_CACHE, tokens_at_once

ATTENTION, OUTPUT, GATED, DOWN = range(4)  # the stages of a Llama-like decoder layer, see `ModelShape`
UNSHARDED_LAYERS = 2  # the running one and the prefetched one


@dataclass(frozen=True)
class StepShape:
    """The windows that go through the model at once: a micro-batch of one process.

    Attributes:
        rows: B.
        window_tokens: M, padding included.
        chunks: T.
        seen: (W,) number of context chunks that the adapter of each window has seen.
        predicted: number of tokens with a loss, over all rows.
    """

    rows: int
    window_tokens: int
    chunks: int
    seen: tuple[int, ...]
    predicted: int

    @classmethod
    def pretraining(cls, rows: int, window_tokens: int, chunks: int, slices: int = 1) -> StepShape:
        """Segments of T chunks with `slices` reconstruction windows per chunk (`pretraining_windows`)."""
        seen = (*range(chunks), *(tuple(range(1, chunks + 1)) * slices))
        return cls(rows, window_tokens, chunks, seen, rows * (len(seen) - 1) * (window_tokens - 1))

    @property
    def tokens(self) -> int:
        """B W M."""
        return self.rows * len(self.seen) * self.window_tokens


@dataclass(frozen=True)
class StepSetting:
    """How the step is run.

    Attributes:
        dtype: dtype of the base model and of its activations.
        generator_dtype: dtype of the generators' parameters, their gradients and the optimizer state.
        autocast: whether the step runs under autocast to `dtype`.
        linear_bytes: bytes per weight of the linear layers inside the decoder layers; None for the size of `dtype`.
        shards: number of processes that the weights, generators and optimizer state are sharded over (FSDP2); 1 for
            no sharding.
        accumulates: whether gradients of earlier micro-batches exist while the step runs.
        device: `cuda` or `cpu`; the loss takes larger blocks on a GPU.
    """

    dtype: torch.dtype = torch.bfloat16
    generator_dtype: torch.dtype = torch.float32
    autocast: bool = True
    linear_bytes: float | None = None
    shards: int = 1
    accumulates: bool = False
    device: str = "cuda"


@dataclass(frozen=True)
class Recomputation:
    """What is recomputed in the backward instead of kept; a layer is in at most one of the two.

    Attributes:
        gated: the decoder layers that recompute gate and up.
        whole: the decoder layers that keep only their input.
    """

    gated: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()


NOTHING = Recomputation()


@dataclass(frozen=True)
class StepMemory:
    """Counts the bytes of one step; "kept" means kept for the backward.

    Short names: h, q, k, f are the widths of the hidden states, queries, keys and the feed-forward part (numbers per
    token); a, c, p, s are the bytes per number of activations, of the generators' computation, of their parameters, and
    of states.
    """

    shape: ModelShape
    config: GeneratorConfig
    step: StepShape
    setting: StepSetting
    recomputed: Recomputation = NOTHING

    # Sizes

    @property
    def a(self) -> int:
        return self.setting.dtype.itemsize

    @property
    def c(self) -> int:
        return self.a if self.setting.autocast else self.p

    @property
    def p(self) -> int:
        return self.setting.generator_dtype.itemsize

    @property
    def s(self) -> int:
        return max(self.c, 4)

    @property
    def h(self) -> int:
        return self.shape.hidden

    @property
    def q(self) -> int:
        return self.shape.heads * self.shape.head_dim

    @property
    def k(self) -> int:
        return self.shape.kv_heads * self.shape.head_dim

    @property
    def f(self) -> int:
        return self.shape.stages[-1][0].inputs

    @property
    def rank(self) -> int:
        return adapter_rank(self.config) + self.config.static_rank

    @property
    def split(self) -> bool:
        """Whether the first window runs alone, without a graph (`GenerativeAdapter.forward`)."""
        plain = self.step.chunks > 1 and only_first_is_plain(self.step.seen, self.step.chunks)
        return plain and not self.config.static_rank

    @property
    def windows(self) -> int:
        """Number of windows with a graph, over all rows."""
        return self.step.rows * (len(self.step.seen) - self.split)

    @property
    def tokens(self) -> int:
        """Number of tokens in these windows."""
        return self.windows * self.step.window_tokens

    @property
    def context_tokens(self) -> tuple[int, ...]:
        """Number of tokens that the generators read in each pass; the last pass has a graph."""
        chunk = self.step.rows * self.step.window_tokens
        return (chunk, (self.step.chunks - 1) * chunk) if self.split else (self.step.chunks * chunk,)

    @property
    def formed(self) -> int:
        """Number of adapters of a linear layer that come from a state."""
        return self.step.rows * len(set(self.step.seen) - {0})

    @property
    def adapters(self) -> int:
        """Number of different adapters of a linear layer: with a static term one more, for windows that saw nothing."""
        return self.formed + (self.config.static_rank > 0 and 0 in self.step.seen)

    @property
    def states(self) -> int:
        """Bytes of the states of a linear layer."""
        return int(self.step.rows * self.step.chunks * self.config.state_size**2 * self.s)

    @cached_property
    def layers(self) -> list[int]:
        """The adapted decoder layers."""
        return adapted_layers(self.shape, self.config)

    @cached_property
    def adapted(self) -> list[LinearShape]:
        """The adapted linear layers in each adapted decoder layer."""
        return adapted_linears(self.shape, self.config)

    @cached_property
    def first_stage(self) -> int:
        """The first stage with an adapted linear layer."""
        stages = enumerate(self.shape.stages)
        return next(number for number, stage in stages if any(linear in self.adapted for linear in stage))

    def linears(self, layer: int) -> list[LinearShape]:
        """The adapted linear layers of a decoder layer."""
        return self.adapted if layer in self.layers else []

    def has_graph(self, layer: int, stage: int) -> bool:
        """Whether the input of a stage of linear layers depends on an adapter."""
        return layer > self.layers[0] or (layer == self.layers[0] and stage > self.first_stage)

    def keeps_gated(self, layer: int) -> bool:
        """Whether the backward needs the inputs of the activation."""
        return self.has_graph(layer, DOWN)

    # Present all the time

    def weights(self) -> int:
        """Bytes of the base model's weights."""
        in_layers = sum(linear.weights for linear in self.shape.linears)
        rest = (self.shape.parameters - in_layers * self.shape.layers) * self.a
        each = in_layers * (self.a if self.setting.linear_bytes is None else self.setting.linear_bytes)
        return int((rest + each * self.shape.layers) / self.setting.shards) + self._unsharded(each)

    def parameters_of(self, layer: int) -> int:
        """Bytes of the generator parameters of a decoder layer, in this process."""
        size = sum(generator_parameters(self.config, self.h, linear) for linear in self.linears(layer))
        return size * self.p // self.setting.shards

    def parameters(self) -> int:
        """Bytes of all generators with their sketches."""
        each = self.parameters_of(self.layers[0])
        sketches = len(self.adapted) * self.config.state_size * self.config.rank * self.p
        return len(self.layers) * (each + sketches) + self._unsharded(each * self.setting.shards)

    def _unsharded(self, layer: float) -> int:
        return int(UNSHARDED_LAYERS * layer) if self.setting.shards > 1 else 0

    # Kept for the backward

    def kept(self, layer: int) -> int:
        """Kept by a decoder layer and its adapted linear layers until its backward."""
        if layer in self.recomputed.whole:
            return self.tokens * self.h * self.a
        return self.used(layer)

    def used(self, layer: int) -> int:
        """What the backward of the layer reads, kept or recomputed by then."""
        return self.used_by_base(layer) + self.used_by_adapters(layer)

    def used_by_base(self, layer: int) -> int:
        """Of that, by the layer of the base model."""
        each = 0
        if self.has_graph(layer, ATTENTION):  # norm: input and a number; queries, keys, values, result, log-sum-exp
            each += self.h * self.a + 4
            each += (2 * self.q + 2 * self.k) * self.a + 4 * self.shape.heads
        if self.has_graph(layer, GATED):  # the other norm
            each += self.h * self.a + 4
        return self.tokens * each + self.used_by_gated(layer)

    def used_by_gated(self, layer: int) -> int:
        """Of that, by its feed-forward part: gate and up, or the input if these are recomputed."""
        each = (self.h if layer in self.recomputed.gated else 2 * self.f) if self.keeps_gated(layer) else 0
        return self.tokens * each * self.a

    def kept_by_norm(self) -> int:
        """Kept by the last norm."""
        return self.tokens * (self.h * self.a + 4)

    def used_by_adapters(self, layer: int) -> int:
        """By the adapted linear layers of a decoder layer: lora_A x, and inputs that nothing else keeps."""
        inputs = 0
        for stage, linears in enumerate(self.shape.stages):
            shared = stage == OUTPUT and self.has_graph(layer, ATTENTION)
            shared |= stage == GATED and layer in self.recomputed.gated
            if not shared and any(linear in self.linears(layer) for linear in linears):
                inputs += linears[0].inputs
        return self.tokens * (inputs + self.rank * len(self.linears(layer))) * self.a

    def kept_by_generators(self, layer: int) -> int:
        """Kept by the generators of a decoder layer, from its input to the factors."""
        return sum(self._kept_by_states(layer) + self._kept_by_factors(linear) for linear in self.linears(layer))

    def _kept_by_states(self, layer: int) -> int:
        size = 0
        for tokens in self.context_tokens:  # the normalised hidden states, P | Q, and both projections
            kept = (1 + self.config.token_weights) * self.h + 2 * self.config.state_size
            size += (tokens * kept + 2 * self.config.state_size * self.h) * self.c
        if self.config.delta_rule:  # the weights of tokens, and the states, of which the norm has a copy
            size += 4 * sum(self.context_tokens) + self.states
        if self.has_graph(layer, ATTENTION):  # the norm: a number per token, and its input if that is a wide copy
            size += self.context_tokens[-1] * (4 + (self.h * max(self.p, 4) if self.c != self.a else 0))
        return size

    def _kept_by_factors(self, linear: LinearShape) -> int:
        d, r = self.config.state_size, self.config.rank
        widths = linear.inputs + linear.outputs
        size = self.states + self.adapters * self.rank * widths * self.a
        size += 2 * self.formed * adapter_rank(self.config) * d * self.c  # U and V
        if self.c != self.p:
            size += d * widths * self.c  # A1 and B2 in the lower precision
        if self.config.norm == "polar":
            steps = 2 + 2 * self.config.power_iterations
            size += self.formed * (steps * (d * r * self.s + 8 * r * r) + 8 * (r * r + r))
        return size

    # Temporary

    def in_forward(self) -> int:
        """In the feed-forward part of the last layer: the activation, hidden states, and states of all layers."""
        states = len(self.layers) * len(self.adapted) * self.states if self.split else 0
        return self.tokens * (self.f + 3 * self.h) * self.a + states

    def in_loss(self) -> int:
        """While the last block of logits exists: hidden states, pending gradients, logits."""
        gathers = self.step.predicted < self.step.rows * len(self.step.seen) * (self.step.window_tokens - 1)
        rows = self.step.predicted if gathers else self.step.tokens
        hidden = (self.step.tokens + gathers * rows) * self.h * self.a
        block = min(rows, tokens_at_once(self.setting.device, self.shape.vocabulary))
        logits = block * self.shape.vocabulary
        probabilities = min(logits, LOGITS_IN_CACHE.get(self.setting.device, logits))  # on a CPU, a few rows at a time
        logits = 2 * self.a * logits + max(4, self.a) * probabilities  # including their gradient
        return hidden + rows * self.h * self.a + max(logits, rows * self.h * self.a)

    def in_head(self) -> int:
        """During the backward of the last norm."""
        fused = self.setting.device == "cuda"
        norm = self.a if fused else 8 if self.a == 4 else 12 + self.a
        return max(2 * self.step.tokens * self.h * self.a, (self.step.tokens * self.a + self.tokens * norm) * self.h)

    def in_gated(self, layer: int) -> int:
        """During the backward of a feed-forward part: four tensors of its width, and recomputed gate and up."""
        again = 2 * self.f if layer in self.recomputed.gated else 0
        return self.tokens * (4 * self.f + again + self.h) * self.a

    def in_adapters(self, layer: int) -> int:
        """While the gradients of the factors are computed: one for each window, then the sums."""
        widest = max(max(linear.inputs, linear.outputs) for linear in self.linears(layer))
        each = self.windows * (self.a + 4) + 4 * self.adapters
        return self.tokens * self.h * self.a + self.rank * widest * each

    def in_polar(self) -> int:
        """During the backward of the norm of a linear layer's states."""
        d, r, steps = self.config.state_size, self.config.rank, 2 + 2 * self.config.power_iterations
        return 2 * self.tokens * self.h * self.a + self.formed * d * (4 * steps * r + d) * self.s

    def in_states(self) -> int:
        """During the backward of a linear layer's states, down to the hidden states."""
        d, tokens = self.config.state_size, self.context_tokens[-1]
        projected = tokens * 2 * d * (2 * self.s + self.c + (self.s if self.c < 4 else 0))
        if self.config.delta_rule:  # what the tokens of all chunks write and are to each other
            update = tokens * (10 * d + 5 * self.step.window_tokens) * self.s + 2 * self.states
            projected = max(projected, update)
        rest = tokens * self.h * self.c + 2 * d * self.h * (2 * self.c + self.p)
        return 2 * self.tokens * self.h * self.a + 3 * self.states + projected + rest

    # Moments

    def moments(self) -> Iterator[tuple[str, dict[str, int]]]:
        """The bytes by part at each moment that can be the peak."""
        layers = range(self.shape.layers)
        gradients = [self.parameters_of(layer) for layer in layers]
        base = [self.kept(layer) for layer in layers]
        generators = [self.kept_by_generators(layer) for layer in layers]
        full = sum(base) + self.kept_by_norm(), sum(generators)
        earlier = sum(gradients) if self.setting.accumulates else 0
        yield "at the end of the forward", self._parts(earlier, *full, self.in_forward())
        yield "in the loss", self._parts(earlier, *full, self.in_loss())
        yield "in the backward of the loss", self._parts(earlier, *full, self.in_head())
        for layer in reversed(layers):
            kept = sum(base[:layer]) + self.used(layer), sum(generators[: layer + 1])
            there = earlier or sum(gradients[layer + 1 :])
            name = f"in the backward of layer {layer}"
            if self.keeps_gated(layer):
                yield f"{name}, feed-forward part", self._parts(there, *kept, self.in_gated(layer))
            if self.linears(layer):
                there, below = earlier or sum(gradients[layer:]), sum(base[:layer])
                rest = kept[0] - self.used_by_gated(layer)
                yield f"{name}, adapters", self._parts(there, rest, kept[1], self.in_adapters(layer))
                yield f"{name}, norm of the states", self._parts(there, below, kept[1], self.in_polar())
                left = kept[1] - sum(self._kept_by_factors(linear) for linear in self.linears(layer))
                yield f"{name}, states", self._parts(there, below, left, self.in_states())
        yield "in the optimizer", self._parts(sum(gradients), 0, 0, 0)

    @cached_property
    def _there(self) -> dict[str, int]:
        """The bytes that are in use all the time."""
        return {
            "weights of the base model": self.weights(),
            "generators": self.parameters(),
            "state of AdamW": 2 * len(self.layers) * self.parameters_of(self.layers[0]),
        }

    def _parts(self, gradients: int, base: int, generators: int, workspace: int) -> dict[str, int]:
        return {
            **self._there,
            "gradients": gradients,
            "kept by the base model": base,
            "kept by the generators": generators,
            "workspace": workspace,
        }


def generator_parameters(config: GeneratorConfig, hidden: int, linear: LinearShape) -> int:
    """Number of parameters of the generator of one linear layer."""
    widths = linear.inputs + linear.outputs
    return (
        config.state_size * (2 * hidden + widths)
        + hidden * (1 + (config.token_weights or config.delta_rule))
        + config.static_rank * widths
    )
