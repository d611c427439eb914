"""Log-probabilities of tokens under the model's own distribution: before temperature, penalties and biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gakernels.model import GenerativeAdapter
from gakernels.model.transfer import moved

_BLOCK = 256  # tokens of a prompt whose logits are in memory at once


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability; None for the first token of a prompt, which nothing predicts.
        top: the most likely tokens in its place with their log-probabilities, the most likely first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Scores:
    """Log-probabilities on their way from the device; reading them waits for the work queued so far.

    Args:
        logits: (N, vocabulary).
        tokens: (N,) ids, on the same device.
        top: number of the most likely tokens to tell.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, top: int) -> None:
        logprobs = torch.log_softmax(logits.float(), -1)
        best = logprobs.topk(min(top, logprobs.shape[-1]))
        found = (tokens, logprobs.gather(-1, tokens[:, None])[:, 0], best.indices, best.values)
        self._found = [tensor.to("cpu", non_blocking=True) for tensor in found]

    def read(self) -> list[TokenLogprob]:
        """One for each of the tokens."""
        rows = zip(*(tensor.tolist() for tensor in self._found), strict=True)
        return [TokenLogprob(token, own, tuple(zip(*best, strict=True))) for token, own, *best in rows]


@torch.inference_mode()
def prompt_scores(model: GenerativeAdapter, hidden: Tensor, prompt: Sequence[int], top: int) -> list[Scores]:
    """The log-probabilities of a prompt's tokens but the first, in blocks.

    Args:
        model: its head makes the logits.
        hidden: last hidden states (tokens, d_h) of the prompt.
        prompt: token ids.
        top: number of the most likely tokens to tell.
    """
    targets = moved(torch.tensor(prompt[1:]), hidden.device)
    blocks = zip(hidden[:-1].split(_BLOCK), targets.split(_BLOCK), strict=True) if len(targets) else ()
    return [Scores(model.logits(states), tokens, top) for states, tokens in blocks]
