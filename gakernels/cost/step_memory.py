"""The bytes of a training step, computed from shapes for each part and moment (docs/training.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from gakernels.cost.flops import adapter_rank, has_gate
from gakernels.cost.pass_memory import ATTENTION, NOTHING, ModelSizes, PassMemory, PassShape, Recomputation
from gakernels.cost.shapes import LinearShape
from gakernels.model.config import GeneratorConfig
from gakernels.model.windows import only_first_is_plain

UNSHARDED_LAYERS = 2  # the running one and the prefetched one

Moment = tuple[str, dict[str, int]]
Kept = tuple[int, int]  # bytes by the base model, and by the generators


@dataclass(frozen=True)
class ConversationShape:
    """Windows of conversations about contexts.

    Attributes:
        windows: N, over all rows.
        window_tokens: M, padding included.
        predicted: number of tokens with a loss.
        packed: whether a window may hold several conversations.
    """

    windows: int
    window_tokens: int
    predicted: int
    packed: bool


@dataclass(frozen=True)
class StepShape:
    """The windows that go through the model at once: a micro-batch of one process.

    Attributes:
        rows: B.
        window_tokens: M, padding included.
        chunks: T.
        seen: (W,) number of context chunks that the adapter of each window has seen.
        predicted: number of tokens with a loss, over all rows.
        conversations: the windows that are read after these under the adapters of the whole contexts (instruction
            tuning); None for none.
    """

    rows: int
    window_tokens: int
    chunks: int
    seen: tuple[int, ...]
    predicted: int
    conversations: ConversationShape | None = None

    @classmethod
    def pretraining(cls, rows: int, window_tokens: int, chunks: int, slices: int = 1) -> StepShape:
        """Segments of T chunks with `slices` reconstruction windows per chunk (`pretraining_windows`)."""
        seen = (*range(chunks), *(tuple(range(1, chunks + 1)) * slices))
        return cls(rows, window_tokens, chunks, seen, rows * (len(seen) - 1) * (window_tokens - 1))


@dataclass(frozen=True)
class StepMemory(ModelSizes):
    """Counts the bytes of one step; "kept" means kept for the backward."""

    step: StepShape
    recomputed: Recomputation = NOTHING

    @property
    def split(self) -> bool:
        """Whether the first window runs alone, without a graph (`GenerativeAdapter.forward`)."""
        plain = self.step.chunks > 1 and only_first_is_plain(self.step.seen, self.step.chunks)
        return plain and not self.config.static_rank

    @cached_property
    def contexts(self) -> PassMemory:
        """The pass of the contexts, in two if `split`."""
        step, static = self.step, self.config.static_rank > 0
        adapters = self.formed + (static and 0 in step.seen)  # one more, for windows that saw nothing
        graphed = step.rows * (len(step.seen) - self.split) if adapters else 0
        windows = PassShape(step.rows * len(step.seen), graphed, step.window_tokens, adapters, step.predicted)
        return self._pass(windows)

    @cached_property
    def conversations(self) -> PassMemory | None:
        """The pass of the conversations."""
        said = self.step.conversations
        if said is None:
            return None
        adapters, count = self.formed_later or self.contexts.windows.adapters, said.windows
        return self._pass(PassShape(count, count, said.window_tokens, adapters, said.predicted, said.packed))

    def _pass(self, windows: PassShape) -> PassMemory:
        return PassMemory(self.shape, self.config, self.setting, windows, self.recomputed)

    @property
    def context_tokens(self) -> tuple[int, ...]:
        """Number of tokens that the generators read in each pass; the last pass has a graph."""
        chunk = self.step.rows * self.step.window_tokens
        return (chunk, (self.step.chunks - 1) * chunk) if self.split else (self.step.chunks * chunk,)

    @property
    def formed(self) -> int:
        """Number of adapters of a linear layer that come from a state, in the pass of the contexts."""
        return self.step.rows * len(set(self.step.seen) - {0})

    @property
    def formed_later(self) -> int:
        """Number of adapters of whole contexts that are formed only after that pass, for the conversations."""
        is_known = self.step.conversations is None or self.step.chunks in self.step.seen
        return 0 if is_known else self.step.rows

    @property
    def states(self) -> int:
        """Bytes of the states of a linear layer."""
        return int(self.step.rows * self.step.chunks * self.config.state_size**2 * self.s)

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
        d, widths = self.config.state_size, linear.inputs + linear.outputs
        size = self.states + self.contexts.windows.adapters * self.rank * widths * self.a
        size += self._kept_by_norm(self.formed)
        return size + (d * widths * self.c if self.c != self.p else 0)  # A1 and B2 in the lower precision

    def _kept_later(self, layer: int) -> int:
        """Kept by what forms the adapters of whole contexts after the pass: factors, and the states of its own pass."""
        rank, count = self.rank * self.a, len(self.linears(layer))
        widths = sum(linear.inputs + linear.outputs for linear in self.linears(layer))
        states = self.states // self.step.chunks * (self.step.chunks - 1) if self.split and self.formed_later else 0
        return self.formed_later * rank * widths + count * (self._kept_by_norm(self.formed_later) + states)

    def _kept_by_norm(self, formed: int) -> int:
        d, r = self.config.state_size, self.config.rank
        size = 2 * formed * adapter_rank(self.config) * d * self.c  # U and V
        if self.config.norm == "polar":
            steps = 2 + 2 * self.config.power_iterations
            size += formed * (steps * (d * r * self.s + 8 * r * r) + 8 * (r * r + r))
        return size

    # Temporary

    def in_polar(self, formed: int) -> int:
        """During the backward of the norm of a linear layer's states."""
        d, r, steps = self.config.state_size, self.config.rank, 2 + 2 * self.config.power_iterations
        return formed * d * (4 * steps * r + d) * self.s

    def in_states(self) -> int:
        """During the backward of a linear layer's states, down to the hidden states."""
        d, tokens = self.config.state_size, self.context_tokens[-1]
        projected = tokens * 2 * d * (2 * self.s + self.c + (self.s if self.c < 4 else 0))
        if self.config.delta_rule:  # what the tokens of all chunks write and are to each other
            update = tokens * (10 * d + 5 * self.step.window_tokens) * self.s + 2 * self.states
            projected = max(projected, update)
        rest = tokens * self.h * self.c + 2 * d * self.h * (2 * self.c + self.p)
        return 3 * self.states + projected + rest

    # Moments

    def moments(self) -> Iterator[Moment]:
        """The bytes by part at each moment that can be the peak."""
        layers, contexts = range(self.shape.layers), self.contexts
        base, generators = [contexts.kept(layer) for layer in layers], [self.kept_by_generators(n) for n in layers]
        later = [self._kept_later(layer) for layer in layers]
        states = len(self.layers) * len(self.adapted) * self.states if self.split else 0
        yield from self._forward(contexts, (0, sum(generators)), states, sum(later))
        waiting = [0] * len(layers)  # gradients that conversations leave for the generators of a layer
        if self.conversations is not None:
            base = [0 if self._is_unread(layer) else kept for layer, kept in enumerate(base)]
            yield from self._with_conversations(self.conversations, sum(base), generators, later)
            waiting = [self._left_for(layer) for layer in layers]
        for layer in reversed(layers):
            below, kept = sum(base[:layer]), sum(generators[: layer + 1])
            there = self._gradients(layer + 1) + sum(waiting[: layer + 1])
            then = self._gradients(layer) + sum(waiting[:layer])
            if not self._is_unread(layer):
                yield from self._backward(contexts, layer, (below, kept), (there, then))
            if self.linears(layer):
                name, hidden = f"in the backward of layer {layer}", 2 * contexts.tokens * self.h * self.a
                workspace = hidden + self.in_polar(self.formed)
                yield f"{name}, norm of the states", self._parts(then, below, kept, workspace)
                kept -= sum(self._kept_by_factors(linear) for linear in self.linears(layer))
                yield f"{name}, states", self._parts(then, below, kept, hidden + self.in_states())
        yield "in the optimizer", self._parts(self._gradients(0), 0, 0, 0)

    def _forward(
        self, one: PassMemory, before: Kept, states: int = 0, later: int = 0, of: str = ""
    ) -> Iterator[Moment]:
        """The moments of a pass and its loss.

        Args:
            one: the pass.
            before: kept by others.
            states: that are there until its end.
            later: what generators keep from then on.
            of: follows the names of the moments.
        """
        gradients, base = self._gradients(self.shape.layers), before[0] + one.kept_by_all()
        yield f"at the end of the forward{of}", self._parts(gradients, base, before[1], one.in_forward() + states)
        if one.windows.predicted:
            kept = before[1] + later
            yield f"in the loss{of}", self._parts(gradients, base, kept, one.in_loss())
            yield f"in the backward of the loss{of}", self._parts(gradients, base, kept, one.in_head())

    def _backward(
        self, one: PassMemory, layer: int, below: Kept, gradients: tuple[int, int], of: str = ""
    ) -> Iterator[Moment]:
        """The moments in a layer of a pass; `gradients`: those above the layer, and with those of the layer."""
        kept, name = below[0] + one.used(layer), f"in the backward of layer {layer}{of}"
        if self.keeps_gated(layer):
            yield f"{name}, feed-forward part", self._parts(gradients[0], kept, below[1], one.in_gated(layer))
        if self.linears(layer):
            kept -= one.used_by_gated(layer)
            yield f"{name}, adapters", self._parts(gradients[1], kept, below[1], one.in_adapters(layer))

    def _with_conversations(
        self, said: PassMemory, contexts: int, generators: list[int], later: list[int]
    ) -> Iterator[Moment]:
        """From the pass of the conversations until their gradients are those of states."""
        layers, of = range(self.shape.layers), " of the conversations"
        if self.step.predicted:
            contexts += self.contexts.kept_by_norm() + self.step.predicted * self.h * self.a  # the gradient of the loss
        everything = sum(generators) + sum(later)
        yield from self._forward(said, (contexts, everything), of=of)
        factors, none = [self._of_factors(layer) for layer in layers], self._gradients(len(layers))
        kept_by = [said.kept(layer) for layer in layers]
        left = [self._left_for(layer) for layer in layers]
        for layer in reversed(layers):
            below = contexts + sum(kept_by[:layer])
            waiting = none + sum(factors[layer + 1 :]), none + sum(factors[layer:])
            yield from self._backward(said, layer, (below, everything), waiting, of)
        for layer in reversed(self.layers if self.formed_later else []):
            gradients = none + sum(factors[:layer]) + sum(left[layer:])
            kept = sum(generators) + sum(later[: layer + 1])
            name = f"in the backward of layer {layer}, norm of the last states"
            yield name, self._parts(gradients, contexts, kept, self.in_polar(self.formed_later))

    def _is_unread(self, layer: int) -> bool:
        """Whether nothing depends on the output of a layer in the pass of the contexts but its states."""
        return self.conversations is not None and not self.step.predicted and layer >= self.layers[-1]

    def _gradients(self, layer: int) -> int:
        """The gradients of the generators' parameters, from this layer on, or all of them."""
        first = 0 if self.setting.accumulates else layer
        return len([n for n in self.layers if n >= first]) * self.parameters_of(self.layers[0])

    def _of_factors(self, layer: int) -> int:
        """The gradients of the factors that conversations used."""
        adapters = self.formed_later or self.contexts.windows.adapters
        widths = sum(linear.inputs + linear.outputs for linear in self.linears(layer))
        return adapters * self.rank * widths * self.a

    def _left_for(self, layer: int) -> int:
        """What the gradients of these factors become before the contexts' backward: those of states and maps."""
        if not self.formed_later:
            return self._of_factors(layer)
        d, maps = self.config.state_size, self.config.state_size + self.config.static_rank
        widths = sum(linear.inputs + linear.outputs for linear in self.linears(layer))
        states = len(self.linears(layer)) * self.formed_later * d * d * self.s
        return states + (0 if self.setting.accumulates else maps * widths * self.p // self.setting.shards)

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
    return config.state_size * (2 * hidden + widths) + hidden * (1 + has_gate(config)) + config.static_rank * widths
