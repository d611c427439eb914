"""Cross-entropy of the next token behind a frozen head, without the logits of all tokens at once."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 27}  # fits a CPU's cache; half a gigabyte of float32


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
    losses: Tensor = _TokenLoss.apply(hidden, targets, head, vocabulary)  # type: ignore[no-untyped-call]
    return losses


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for block, wanted in _blocks(hidden, targets, vocabulary):
            with torch.set_grad_enabled(needs_gradient):
                leaf = block.detach().requires_grad_(needs_gradient)
                logits = head(leaf)
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = F.cross_entropy(wide, wanted, reduction="none")
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


def _blocks(hidden: Tensor, targets: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    limit = LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE["cpu"])
    tokens = max(1, limit // vocabulary)
    return zip(hidden.split(tokens), targets.split(tokens), strict=True)
