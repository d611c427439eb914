"""One forward pass over windows: which windows form the context, and which adapter each window sees.

Windows are folded into the batch, so each attends only to itself and its positions start at 0. The decoder layers run
in order; before each, its generators read the layer's input of the context windows, form the states and the adapters
of all prefixes, and pass them to the layer's linear layers. So one pass handles all chunks of a context, and window t
is encoded with the adapter of the chunks before it (section 2.2 and appendix B of the paper).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.model.transfer import moved
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
        formed: the adapters of all windows, by name; filled in by the pass.
    """

    batch: int
    chunks: int
    seen: tuple[int, ...]
    mask: Tensor | None
    initial_states: Mapping[str, Tensor] | None = None
    differentiable: bool = field(default_factory=torch.is_grad_enabled)
    states: dict[str, Tensor] = field(default_factory=dict)
    formed: dict[str, LowRankFactors] = field(default_factory=dict)
    _indices: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

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

    def last_factors(self, name: str, generator: AdapterGenerator, scale: float, owner: Tensor) -> LowRankFactors:
        """After the pass: the adapters of the whole context, for further windows (N,) about the rows `owner`."""
        if self.chunks not in self.seen:
            lora_a, lora_b = generator.factors(self.states[name])
            return LowRankFactors(lora_a, lora_b, scale, owner.to(lora_a.device))
        factors = self.formed[name]
        index = (owner + 1) * len(self._distinct()) - 1  # the last one of the row
        return replace(factors, adapter_index=index.to(factors.lora_a.device))

    def _factors(self, name: str, generator: AdapterGenerator, hidden: Tensor, scale: float) -> LowRankFactors | None:
        windows = hidden.unflatten(0, (self.batch, len(self.seen)))[:, : self.chunks]
        initial = None if self.initial_states is None else self.initial_states[name]
        mask = None if self.mask is None else self.mask.to(hidden.device)
        states = generator.states(windows, mask, initial)
        self.states[name] = states[:, -1]
        distinct = self._distinct()
        lora_a, lora_b = [], []
        if distinct:
            formed_a, formed_b = generator.factors(_prefixes(states, initial, distinct))
            lora_a, lora_b = [formed_a.flatten(0, 1)], [formed_b.flatten(0, 1)]
        if generator.static_rank and not self._all_formed:
            empty_a, empty_b = generator.empty_factors()
            lora_a, lora_b = [*lora_a, empty_a[None]], [*lora_b, empty_b[None]]
        if not lora_a:
            return None
        index = self._adapter_index(hidden.device, bool(generator.static_rank))
        return LowRankFactors(_joined(lora_a), _joined(lora_b), scale, index)

    def _distinct(self) -> list[int]:
        """The distinct prefix lengths that windows see; each needs one adapter per row."""
        return sorted({count for count in self.seen if count or self.initial_states is not None})

    @property
    def _all_formed(self) -> bool:
        """Whether every window sees an adapter that comes from a state."""
        return self.initial_states is not None or 0 not in self.seen

    def _adapter_index(self, device: torch.device, has_static: bool) -> Tensor:
        """(B W,): index of the adapter of each window, row by row, the same for all layers.

        A window that has seen nothing has -1, or with a static term the adapter after those of all rows.
        """
        if device not in self._indices:
            distinct = self._distinct()
            none = self.batch * len(distinct) if has_static else -1
            slots = torch.tensor([distinct.index(count) if count in distinct else -1 for count in self.seen])
            rows = torch.arange(self.batch)[:, None] * len(distinct)
            self._indices[device] = moved(torch.where(slots < 0, none, rows + slots).flatten(), device)
        return self._indices[device]


def _joined(factors: Sequence[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(list(factors))


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
