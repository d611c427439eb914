"""Which token comes next: greedy, or drawn from the row's distribution with the row's own random numbers; and what a
request adds to the logits before: a bias, and penalties for tokens that the row already has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gakernels.errors import InputError, check_least
from gakernels.model.transfer import moved


@dataclass(frozen=True)
class Sampling:
    """How a row is continued.

    Attributes:
        max_new_tokens: longest continuation.
        temperature: 0 always takes the most likely token; otherwise the logits are divided by it.
        top_k: draw from the k most likely tokens only; 0 for all.
        top_p: draw from the most likely tokens whose probabilities reach this sum.
        seed: of the row's random numbers; None for a fresh one.
        stop: the continuation ends before the first of these texts.
        stop_at_end_token: whether the model's end tokens end it.
        stop_token_ids: further tokens that end it; their text is left out.
        skip_special_tokens: whether special tokens are left out of the text. Stop texts see them either way.
        presence_penalty: subtracted once from the logit of each token that the continuation already has.
        frequency_penalty: subtracted once per occurrence of the token in the continuation.
        logit_bias: pairs (token id, number added to its logit).
        logprobs: return the log-probability of each new token, and of this many of the most likely tokens in its place,
            under the model's own distribution: before temperature, penalties and bias. None for nothing.
        prompt_logprobs: also return those of the prompt's tokens; needs `logprobs`.

    Raises:
        InputError: a value is out of range.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_at_end_token: bool = True
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        check_least(1, max_new_tokens=self.max_new_tokens)
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be finite and at least 0, but it is {self.temperature}")
        check_least(0, top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, but it is {self.top_p}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError(f"stop must be a tuple of texts that are not empty, but it is {self.stop!r}")
        biases = tuple(value for _, value in self.logit_bias)
        added = {"presence_penalty": (self.presence_penalty,), "frequency_penalty": (self.frequency_penalty,)}
        for name, values in {**added, "logit_bias": biases}.items():
            if not all(map(math.isfinite, values)):
                raise InputError(f"{name} must be finite, but it is {', '.join(map(str, values))}")
        if self.logprobs is not None and self.logprobs < 0:
            raise InputError(f"logprobs must be at least 0 or None, but it is {self.logprobs}")
        if self.prompt_logprobs and self.logprobs is None:
            raise InputError("prompt_logprobs needs logprobs, but that is None")

    @property
    def adjusts(self) -> bool:
        """Whether it adds anything to the model's logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


class Adjustment:
    """The bias of a row, and its counts of generated tokens, on the device.

    bias - c * frequency_penalty - (presence_penalty if c > 0) is added to the logit of a token that has occurred c
    times.

    Args:
        sampling: the row's bias and penalties.
        vocabulary: number of logits.
        device: of the logits.

    Raises:
        InputError: the bias names a token that is not in the vocabulary.
    """

    def __init__(self, sampling: Sampling, vocabulary: int, device: torch.device) -> None:
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        self._bias, self._counts = torch.zeros(2, vocabulary, dtype=torch.float64, device=device)
        self._one = torch.ones(1, dtype=torch.float64, device=device)
        if sampling.logit_bias:
            tokens, values = zip(*sampling.logit_bias, strict=True)
            if not 0 <= min(tokens) <= max(tokens) < vocabulary:
                raise InputError(f"logit_bias must be for token ids below {vocabulary}, but has {sorted(tokens)}")
            amounts = moved(torch.tensor(values, dtype=torch.float64), device)
            self._bias.index_add_(0, moved(torch.tensor(tokens), device), amounts)

    def added(self) -> Tensor:
        """What is added to the logits (vocabulary,) of the next token, float64."""
        return self._bias - self._frequency * self._counts - self._presence * (self._counts > 0).double()

    def count(self, token: Tensor) -> None:
        """Note the row's next token (1,)."""
        self._counts.index_add_(0, token, self._one)


def adjusted(logits: Tensor, adjustments: Sequence[Adjustment | None]) -> Tensor:
    """The logits (rows, vocabulary) with what each row adds; the same tensor if none adds anything."""
    changed = [(row, adjustment) for row, adjustment in enumerate(adjustments) if adjustment is not None]
    if not changed:
        return logits
    wide = logits.double()
    wide = wide.clone() if wide is logits else wide
    for row, adjustment in changed:
        wide[row] += adjustment.added()
    return wide


def next_tokens(logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]) -> Tensor:
    """The next token of each row of logits (rows, vocabulary), on their device. Never waits for the device.

    Args:
        logits: of the rows.
        samplings: of the rows.
        generators: random numbers of the rows, on the CPU; not used if the temperature is 0.
    """
    tokens = logits.argmax(-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        # One random number per row, drawn on the CPU: the same on every device and in every batch.
        uniform = torch.cat([torch.rand(1, generator=generators[row], dtype=torch.float64) for row in drawn])
        rows = moved(torch.tensor(drawn), logits.device)
        found = draw(logits.index_select(0, rows), [samplings[row] for row in drawn], moved(uniform, logits.device))
        tokens.index_copy_(0, rows, found)
    return tokens


def draw(logits: Tensor, samplings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """The tokens (rows,) at which the cumulative distributions of the rows, most likely token first, exceed `uniform`.

    Args:
        logits: (rows, vocabulary).
        samplings: of the rows, with temperatures above 0.
        uniform: (rows,) float64 in [0, 1).
    """

    def column(values: Sequence[float]) -> Tensor:
        return moved(torch.tensor(values, dtype=torch.float64), logits.device)[:, None]

    wide = logits.double()
    scaled = (wide - wide.amax(-1, keepdim=True)) / column([sampling.temperature for sampling in samplings])
    values, order = torch.softmax(scaled, -1).sort(descending=True, stable=True)
    size = values.shape[-1]
    most = column([sampling.top_k or size for sampling in samplings])
    before = values.cumsum(-1) - values
    inside = (before < column([sampling.top_p for sampling in samplings])) & (
        torch.arange(size, device=logits.device) < most
    )
    inside[:, 0] = True  # even if top_p is so small that it rounds to zero
    total = values.masked_fill(~inside, 0).cumsum(-1)
    place = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)
    return order.gather(-1, torch.minimum(place, inside.sum(-1, keepdim=True) - 1))[:, 0]
