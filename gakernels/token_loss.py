"""Cross-entropy of the next token behind a frozen head, without the logits of all tokens at once."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}  # fits a CPU's cache; a quarter of a gigabyte of float32


def token_loss(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
    """Negative log-likelihood of each target token, in nats.

    The head's parameters are frozen, so that all a token's loss hands back is the gradient of its own hidden state. It
    is computed along with the loss, for a block of tokens at a time, and scaled in the backward.

    Args:
        hidden: (N, d_h), last hidden states.
        targets: (N,) int64, the token that follows each of them.
        head: from hidden states (n, d_h) to logits (n, vocabulary), row by row; none of its parameters gets a gradient.
        vocabulary: number of logits of a token, from which the size of the blocks follows.

    Returns:
        (N,), float32 or wider.
    """

    def cross_entropy(block: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(wide(head(block)), wanted, reduction="none")

    return loss_in_blocks(hidden, targets, cross_entropy, vocabulary)


def wide(logits: Tensor) -> Tensor:
    """The same numbers in float32, if they are in less."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def loss_in_blocks(
    hidden: Tensor, beside: Tensor, loss: Callable[[Tensor, Tensor], Tensor], logits_per_token: int
) -> Tensor:
    """A loss of each token (N,), of which the gradient of its hidden state is all that is kept.

    Args:
        hidden: (N, d_h).
        beside: (N, ...), what else the loss of a token needs; it gets no gradient.
        loss: from a block of both to the losses (n,) of its tokens, each of its own hidden state alone.
        logits_per_token: from which the size of the blocks follows.
    """
    losses: Tensor = _LossInBlocks.apply(hidden, beside, loss, logits_per_token)  # type: ignore[no-untyped-call]
    return losses


class _LossInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, beside: Tensor, function: Callable[[Tensor, Tensor], Tensor], logits_per_token: int
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for block, wanted in _blocks(hidden, beside, logits_per_token):
            with torch.set_grad_enabled(needs_gradient):
                leaf = block.detach().requires_grad_(needs_gradient)
                loss = function(leaf, wanted)
                if needs_gradient:
                    gradients.append(torch.autograd.grad(loss.sum(), leaf)[0])
            losses.append(loss.detach())
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None, None


def _blocks(hidden: Tensor, beside: Tensor, logits_per_token: int) -> Iterator[tuple[Tensor, Tensor]]:
    tokens = tokens_at_once(hidden.device.type, logits_per_token)
    return zip(hidden.split(tokens), beside.split(tokens), strict=True)


def tokens_at_once(device: str, logits_per_token: int) -> int:
    """Tokens in a block on a kind of device."""
    return max(1, LOGITS_AT_ONCE.get(device, LOGITS_AT_ONCE["cpu"]) // logits_per_token)
