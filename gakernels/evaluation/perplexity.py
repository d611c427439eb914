"""Perplexity of held-out windows with the adapter of their own context, of another one, with none, with a control."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.evaluation.bootstrap import ratio_of_perplexities
from gakernels.model import GenerativeAdapter
from gakernels.nn import LowRankFactors


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexities of the same windows under different adapters.

    Attributes:
        perplexity: by adapter: `none`, `own`, `other`, and the names of the controls.
        own_over_other: 95% bootstrap interval of the ratio of the two, paired by context.
        contexts: number of contexts.
        tokens: number of scored tokens.
    """

    perplexity: dict[str, float]
    own_over_other: tuple[float, float]
    contexts: int
    tokens: int

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {**vars(self), "own_over_other": list(self.own_over_other)}


@torch.no_grad()
def context_perplexity(
    model: GenerativeAdapter,
    segments: Tensor,
    chunks: int,
    controls: Mapping[str, Mapping[str, LowRankFactors]] | None = None,
    batch_size: int = 4,
) -> PerplexityReport:
    """Score every window of held-out segments, closed-book, under different adapters.

    The adapter `own` is made from all T chunks of the segment, `other` from the next segment (the last takes the
    first), each in a pass of its own; the windows scored are the T chunks.

    Args:
        model: the generator with its base model.
        segments: (n, T * M) token ids, n >= 2.
        chunks: T.
        controls: factors by adapted layer, by name of the control (a static LoRA).
        batch_size: segments in one pass.

    Raises:
        InputError: there are fewer than two segments.
    """
    if len(segments) < 2:
        raise InputError(
            f"segments must be at least two, so that there is another context, but there are {len(segments)}"
        )
    windows = segments.view(len(segments), chunks, -1)
    losses: dict[str, list[Tensor]] = {}
    for start in range(0, len(segments), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(segments)))
        batch = windows[rows].to(model.device)
        own = _own_factors(model, batch)
        other = _own_factors(model, windows[(rows + 1) % len(segments)].to(model.device))
        for name, factors in {"none": {}, "own": own, "other": other, **(controls or {})}.items():
            losses.setdefault(name, []).append(_score(model, batch, factors))
    totals = {name: torch.cat(parts).cpu() for name, parts in losses.items()}
    tokens = torch.full((len(segments),), chunks * (windows.shape[2] - 1))
    # A model that has diverged completely still gets a number: e^700 is about the largest there is.
    perplexity = {name: math.exp(min(float(total.sum() / tokens.sum()), 700.0)) for name, total in totals.items()}
    interval = ratio_of_perplexities(totals["own"], totals["other"], tokens)
    return PerplexityReport(perplexity, interval, len(segments), int(tokens.sum()))


def _own_factors(model: GenerativeAdapter, windows: Tensor) -> dict[str, LowRankFactors]:
    """Factors of each segment's final state, one adapter per segment (B, T, M)."""
    mask = torch.ones(windows.shape, dtype=torch.bool, device=windows.device)
    states = model(windows, mask, windows.shape[1], range(windows.shape[1]))[1]
    scale = model.config.adapter_scale
    return {name: LowRankFactors(*model.generator(name).factors(state), scale) for name, state in states.items()}


def _score(model: GenerativeAdapter, windows: Tensor, factors: Mapping[str, LowRankFactors]) -> Tensor:
    """Summed negative log-likelihood (B,) of all windows (B, T, M), without the first token of each."""
    with model.using(factors):
        output = model.base.get_decoder()(input_ids=windows.flatten(0, 1), use_cache=False)
    hidden, targets = output.last_hidden_state[:, :-1], windows.flatten(0, 1)[:, 1:]
    losses = model.token_loss(hidden.flatten(0, 1), targets.flatten())
    return losses.view(len(windows), -1).double().sum(1)
