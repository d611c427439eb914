"""What a request adds to the logits of its row: a bias, and penalties for tokens that the row already has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.generation.sampling import Sampling
from gakernels.model.transfer import moved


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
