"""Reconstruction and completion perplexity under the context's own adapter, another one, none, or a control.

The paper's two measures: a context of n tokens becomes an adapter, which then scores the same n tokens (reconstruction)
and the tokens that follow them (completion), closed-book.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from gakernels.bootstrap import ratio_of_perplexities
from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter
from gakernels.nn import LowRankFactors


@dataclass(frozen=True)
class HeldOutContexts:
    """Token ids from which adapters are made, and which are scored.

    Attributes:
        contexts: (n, T * M), n >= 2.
        continuations: (n, T' * M), what follows each context; None if only reconstruction is scored.
        documents: (n,) the document that each context comes from; None if unknown.

    Raises:
        InputError: there are fewer than two contexts, the numbers of parts differ, or all contexts are of one document.
    """

    contexts: Tensor
    continuations: Tensor | None = None
    documents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.contexts)
        if count < 2:
            raise InputError(f"contexts must be at least two, so that there is another one, but there are {count}")
        for name, part in (("continuations", self.continuations), ("documents", self.documents)):
            if part is not None and len(part) != count:
                raise InputError(f"{name} must be one for each of the {count} contexts, but there are {len(part)}")
        if self.documents is not None and len(set(self.documents)) < 2:
            raise InputError("documents must be at least two, so that there is another, but all contexts are of one")

    def others(self) -> list[int]:
        """For each context, the number of the next one (cyclically) that comes from another document."""
        count, documents = len(self.contexts), self.documents or range(len(self.contexts))
        return [
            next((row + step) % count for step in range(1, count) if documents[(row + step) % count] != documents[row])
            for row in range(count)
        ]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two perplexities with its 95% bootstrap interval, paired, over contexts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskPerplexity:
    """Perplexities of the same tokens under different adapters.

    Attributes:
        perplexity: by adapter: `none` (the base model alone), `empty` (the adapter of an empty context, which is the
            static term; only if the generators have one), `own`, `other`, and the names of the controls. Every
            context has the same number of tokens, so it is the exponential of both the mean over tokens and that over
            contexts.
        own_over: the perplexity of `own` over that of every other adapter.
        tokens: number of scored tokens.
    """

    perplexity: dict[str, float]
    own_over: dict[str, Ratio]
    tokens: int


@dataclass(frozen=True)
class PerplexityReport:
    """The result of `context_perplexity`.

    Attributes:
        contexts: their number.
        context_tokens: tokens of each.
        other_documents: whether the other context is known to come from another document.
        reconstruction: perplexities of the context's own tokens.
        completion: perplexities of the tokens after it, if there are any.
    """

    contexts: int
    context_tokens: int
    other_documents: bool
    reconstruction: TaskPerplexity
    completion: TaskPerplexity | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return asdict(self)


@torch.no_grad()
def context_perplexity(
    model: GenerativeAdapter,
    held_out: HeldOutContexts,
    chunks: int,
    controls: Mapping[str, Mapping[str, LowRankFactors]] | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> PerplexityReport:
    """Score contexts and their continuations, closed-book, under different adapters.

    Each adapter is made from all T chunks of a context. The scored windows have M tokens and are read separately, as in
    training; the first token of a window is not predicted.

    Args:
        model: the base model with its generators.
        held_out: the contexts.
        chunks: T.
        controls: factors by adapted layer, by name of the control (a static LoRA).
        batch_size: contexts in one pass.
        progress: show a progress bar.

    Raises:
        InputError: the contexts or their continuations can't be cut into chunks of one size.
    """
    windows = _windows(held_out, chunks)
    others, count = held_out.others(), len(held_out.contexts)
    fixed: dict[str, Mapping[str, LowRankFactors]] = {"none": {}}
    if model.config.static_rank:
        fixed["empty"] = _empty_factors(model)
    fixed |= controls or {}
    losses: dict[str, dict[str, list[Tensor]]] = {task: {} for task in windows}
    for start in tqdm(range(0, count, batch_size), desc="perplexity", unit="batch", disable=not progress, leave=False):
        rows = list(range(start, min(start + batch_size, count)))
        contexts = windows["reconstruction"]
        own = _factors(model, contexts[rows].to(model.device))
        other = _factors(model, contexts[[others[row] for row in rows]].to(model.device))
        for task, scored in windows.items():
            batch = scored[rows].to(model.device)
            for name, factors in {**fixed, "other": other, "own": own}.items():
                losses[task].setdefault(name, []).append(_score(model, batch, factors).cpu())
    reports = {task: _report(windows[task], losses[task]) for task in windows}
    return PerplexityReport(
        contexts=count,
        context_tokens=held_out.contexts.shape[1],
        other_documents=held_out.documents is not None,
        reconstruction=reports["reconstruction"],
        completion=reports.get("completion"),
    )


def _windows(held_out: HeldOutContexts, chunks: int) -> dict[str, Tensor]:
    """The scored windows (n, windows, M), by task."""
    tokens = held_out.contexts.shape[1]
    if chunks < 1 or tokens % chunks or tokens < 2 * chunks:
        raise InputError(f"chunks must divide the {tokens} tokens of a context into 2 or more, but is {chunks}")
    length = tokens // chunks
    windows = {"reconstruction": held_out.contexts.view(len(held_out.contexts), chunks, length)}
    after = held_out.continuations
    if after is not None:
        if not after.shape[1] or after.shape[1] % length:
            raise InputError(f"continuations must be of whole windows of {length} tokens, but have {after.shape[1]}")
        windows["completion"] = after.view(len(after), -1, length)
    return windows


def _report(windows: Tensor, losses: Mapping[str, Sequence[Tensor]]) -> TaskPerplexity:
    totals = {name: torch.cat(list(parts)) for name, parts in losses.items()}
    tokens = torch.full((len(windows),), windows.shape[1] * (windows.shape[2] - 1))
    # A model that has diverged completely still gets a number: e^700 is about the largest float64.
    perplexity = {name: math.exp(min(float(total.sum() / tokens.sum()), 700.0)) for name, total in totals.items()}
    ratios = {
        name: Ratio(
            math.exp(max(-700.0, min(float((totals["own"] - total).sum() / tokens.sum()), 700.0))),
            *ratio_of_perplexities(totals["own"], total, tokens),
        )
        for name, total in totals.items()
        if name != "own"
    }
    return TaskPerplexity(perplexity, ratios, int(tokens.sum()))


def _factors(model: GenerativeAdapter, windows: Tensor) -> dict[str, LowRankFactors]:
    """The factors of each context's final state, one adapter per context (B, T, M)."""
    mask = torch.ones(windows.shape, dtype=torch.bool, device=windows.device)
    states = model(windows, mask, windows.shape[1], range(windows.shape[1]))[1]
    scale = model.config.adapter_scale
    return {name: LowRankFactors(*model.generator(name).factors(state), scale) for name, state in states.items()}


def _empty_factors(model: GenerativeAdapter) -> dict[str, LowRankFactors]:
    """The adapter of an empty context: norm(0) = 0 leaves the static term."""
    size, factors = model.config.state_size, {}
    for name in model.adapted_names:
        generator = model.generator(name)
        zero = generator.sketch.new_zeros(1, size, size)
        factors[name] = LowRankFactors(*generator.factors(zero), model.config.adapter_scale)
    return factors


def _score(model: GenerativeAdapter, windows: Tensor, factors: Mapping[str, LowRankFactors]) -> Tensor:
    """Summed negative log-likelihood (B,) of all windows (B, W, M), without the first token of each."""
    with model.using(factors):
        output = model.decoder(input_ids=windows.flatten(0, 1), use_cache=False)
    hidden, targets = output.last_hidden_state[:, :-1], windows.flatten(0, 1)[:, 1:]
    losses = model.token_loss(hidden.flatten(0, 1), targets.flatten())
    return losses.view(len(windows), -1).double().sum(1)
