"""One forward pass over windows: which windows form the context, and which adapter each window sees.

Windows are folded into the batch, so each attends only to itself and its positions start at 0. The decoder layers run
in order; before each, its generators read the layer's input of the context windows, form the states and the adapters
of all prefixes, and pass them to the layer's linear layers. So one pass handles all chunks of a context, and window t
is encoded with the adapter of the chunks before it (section 2.2 and appendix B of the paper).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.nn import AdapterGenerator, LowRankFactors
from gakernels.nn.side_stream import Later, Streams


@dataclass
class ContextPass:
    """The information that the layers need during one pass over B rows of W windows.

    Attributes:
        batch: B.
        chunks: T; the first T of the W windows are the context.
        seen: (W,) number of context chunks that the adapter of each window has seen, 0..T; 0 means the initial
            state: in a fresh context no adapter, or only the static term if the generators have one.
        mask: (B, T, M) bool, False for padding in the context.
        initial_states: S_0 (B, d_r, d_r) by name of the adapted layer; None for a fresh context.
        differentiable: whether the adapters and states carry gradients, even if the pass itself does not; if not given,
            whether gradients are enabled when this object is made.
        states: the state after all T chunks, by name; filled in by the pass.
    """

    batch: int
    chunks: int
    seen: tuple[int, ...]
    mask: Tensor | None
    initial_states: Mapping[str, Tensor] | None = None
    differentiable: bool = field(default_factory=torch.is_grad_enabled)
    states: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(0 <= count <= self.chunks for count in self.seen):
            raise InputError(f"seen must be between 0 and the {self.chunks} context chunks, but it is {self.seen}")

    def factors(self, name: str, generator: AdapterGenerator, hidden: Tensor, scale: float) -> LowRankFactors | None:
        """The adapters of all windows for one linear layer, from the input of its decoder layer (B W, M, d_h)."""
        with torch.set_grad_enabled(self.differentiable):
            return self._factors(name, generator, hidden, scale)

    def factors_later(
        self, name: str, generator: AdapterGenerator, hidden: Tensor, scale: float, streams: Streams
    ) -> Later[LowRankFactors | None]:
        """Like `factors`, but formed on a second stream, when they are first needed."""

        def form() -> tuple[LowRankFactors | None, list[Tensor]]:
            factors = self.factors(name, generator, hidden, scale)
            tensors = [] if factors is None else [factors.lora_a, factors.lora_b, factors.adapter_index]
            return factors, [tensor for tensor in (self.states[name], *tensors) if tensor is not None]

        given = (self.mask, None if self.initial_states is None else self.initial_states[name])
        return Later(streams, [hidden, *(tensor for tensor in given if tensor is not None)], form)

    def _factors(self, name: str, generator: AdapterGenerator, hidden: Tensor, scale: float) -> LowRankFactors | None:
        windows = hidden.unflatten(0, (self.batch, len(self.seen)))[:, : self.chunks]
        initial = None if self.initial_states is None else self.initial_states[name]
        mask = None if self.mask is None else self.mask.to(hidden.device)
        states = generator.states(windows, mask, initial)
        self.states[name] = states[:, -1]
        if generator.static_rank and initial is None and 0 in self.seen:
            initial = torch.zeros_like(states[:, 0])  # norm(0) = 0: only the static term is left
        distinct = self._distinct(initial is not None)
        if not distinct:
            return None
        lora_a, lora_b = generator.factors(_prefixes(states, initial, distinct))
        index = self._adapter_index(distinct).to(hidden.device)
        return LowRankFactors(lora_a.flatten(0, 1), lora_b.flatten(0, 1), scale, index)

    def _distinct(self, has_initial: bool) -> list[int]:
        """The distinct prefix lengths that windows see; each needs one adapter per row."""
        return sorted({count for count in self.seen if count or has_initial})

    def _adapter_index(self, distinct: Sequence[int]) -> Tensor:
        """(B W,): index of the adapter of each window, row by row; -1 where it sees none."""
        slots = torch.tensor([distinct.index(count) if count in distinct else -1 for count in self.seen])
        rows = torch.arange(self.batch)[:, None] * len(distinct)
        return torch.where(slots < 0, -1, rows + slots).flatten()


def _prefixes(states: Tensor, initial: Tensor | None, distinct: Sequence[int]) -> Tensor:
    """The states after the given numbers of chunks (B, len(distinct), d_r, d_r)."""
    if initial is not None and distinct[0] == 0:
        states, distinct = torch.cat([initial[:, None], states], dim=1), [count + 1 for count in distinct]
    first, last = distinct[0], distinct[-1]
    if len(distinct) == states.shape[1]:
        return states  # a slice, even of everything, would cost a copy in the backward
    if list(distinct) == list(range(first, last + 1)):
        return states[:, first - 1 : last]
    return states[:, [count - 1 for count in distinct]]
