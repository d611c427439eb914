"""The bytes of one pass of windows through the base model in a training step, from shapes (docs/training.md)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from gakernels.cost.flops import adapted_layers, adapted_linears, adapter_rank
from gakernels.cost.shapes import LinearShape, ModelShape
from gakernels.model.config import GeneratorConfig
from gakernels.nn.token_loss import LOGITS_IN_CACHE, tokens_at_once

ATTENTION, OUTPUT, GATED, DOWN = range(4)  # the stages of a Llama-like decoder layer, see `ModelShape`


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
class PassShape:
    """The windows of one pass, of all rows together.

    Attributes:
        windows: their number.
        graphed: the number of those whose hidden states depend on an adapter.
        window_tokens: M, padding included.
        adapters: number of different adapters of a linear layer.
        predicted: number of tokens with a loss.
        packed: whether a mask (windows, M, M) keeps several sequences in a window apart.
    """

    windows: int
    graphed: int
    window_tokens: int
    adapters: int
    predicted: int
    packed: bool = False


@dataclass(frozen=True)
class ModelSizes:
    """What follows from the model and the setting alone.

    Short names: h, q, k, f are the widths of the hidden states, queries, keys and the feed-forward part (numbers per
    token); a, c, p, s are the bytes per number of activations, of the generators' computation, of their parameters, and
    of states.
    """

    shape: ModelShape
    config: GeneratorConfig
    setting: StepSetting

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


@dataclass(frozen=True)
class PassMemory(ModelSizes):
    """Counts the bytes of a pass; "kept" means kept for the backward."""

    windows: PassShape
    recomputed: Recomputation = NOTHING

    @property
    def tokens(self) -> int:
        """Number of tokens in windows with a graph."""
        return self.windows.graphed * self.windows.window_tokens

    def kept_by_all(self) -> int:
        """Kept by all layers and the last norm."""
        return sum(map(self.kept, range(self.shape.layers))) + self.kept_by_norm()

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
            keys = self.q if self.windows.packed else self.k  # with a mask, one for each head
            each += (2 * self.q + 2 * keys + self._mask_width) * self.a + 4 * self.shape.heads
        if self.has_graph(layer, GATED):  # the other norm
            each += self.h * self.a + 4
        return self.tokens * each + self.used_by_gated(layer)

    @property
    def _mask_width(self) -> int:
        """Numbers of a mask that each token of a layer keeps."""
        return self.windows.window_tokens if self.windows.packed else 0

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

    def in_forward(self) -> int:
        """In the feed-forward part of the last layer: the activation and hidden states."""
        return self.tokens * (self.f + 3 * self.h) * self.a

    def in_loss(self) -> int:
        """While the last block of logits exists: hidden states, pending gradients, logits."""
        tokens = self.windows.windows * self.windows.window_tokens
        gathers = self.windows.predicted < tokens - self.windows.windows
        rows = self.windows.predicted if gathers else tokens
        hidden = (tokens + gathers * rows) * self.h * self.a
        block = min(rows, tokens_at_once(self.setting.device, self.shape.vocabulary))
        logits = block * self.shape.vocabulary
        probabilities = min(logits, LOGITS_IN_CACHE.get(self.setting.device, logits))  # on a CPU, a few rows at a time
        wide = 8 if self.a < 4 and self.setting.device == "cpu" else max(4, self.a)  # there a widened copy comes first
        logits = 2 * self.a * logits + wide * probabilities  # including their gradient
        return hidden + rows * self.h * self.a + max(logits, rows * self.h * self.a)

    def in_head(self) -> int:
        """During the backward of the last norm."""
        fused = self.setting.device == "cuda"
        norm = self.a if fused else 8 if self.a == 4 else 12 + self.a
        tokens = self.windows.windows * self.windows.window_tokens
        return max(2 * tokens * self.h * self.a, (tokens * self.a + self.tokens * norm) * self.h)

    def in_gated(self, layer: int) -> int:
        """During the backward of a feed-forward part: four tensors of its width, and recomputed gate and up."""
        again = 2 * self.f if layer in self.recomputed.gated else 0
        return self.tokens * (4 * self.f + again + self.h) * self.a

    def in_adapters(self, layer: int) -> int:
        """While the gradients of the factors are computed: one for each window, then the sums."""
        widest = max(max(linear.inputs, linear.outputs) for linear in self.linears(layer))
        each = self.windows.graphed * (self.a + 4) + 4 * self.windows.adapters
        return self.tokens * self.h * self.a + self.rank * widest * each
