"""Next-token cross-entropy through a frozen head, without forming the logits of all tokens at once."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}  # a block of 2 MiB in bfloat16; of 128 MiB
LEAST_TOKENS = 256  # every block reads the whole head: on fewer tokens the product waits for memory
LOGITS_IN_CACHE = {"cpu": 1 << 18}  # float32 numbers that stay in a core's cache between two passes over them

# Takes a block (n, d_h), its part of the other argument and whether a gradient is wanted; returns the losses (n,) of
# its tokens and the gradient (n, d_h) of their sum, or None.
BlockLoss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def token_loss(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
    """Negative log-likelihood of each target token, in nats.

    The head's parameters are frozen, so a token's loss has a gradient only for its own hidden state. That gradient is
    computed along with the loss, for a block of tokens at a time, and scaled in the backward.

    Args:
        hidden: (N, d_h), last hidden states.
        targets: (N,) int64, the token that follows each of them.
        head: from hidden states (n, d_h) to logits (n, vocabulary), row by row; none of its parameters gets a gradient.
        vocabulary: number of logits of a token, which determines the size of the blocks.

    Returns:
        (N,), float32 or wider.
    """

    def take(block: Tensor, wanted: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(needs_gradient):
            leaf = block.detach().requires_grad_(needs_gradient)
            logits = head(leaf)
        loss, grad_logits = _cross_entropy(logits.detach(), wanted, needs_gradient)
        return loss, None if grad_logits is None else torch.autograd.grad(logits, leaf, grad_logits)[0]

    return loss_in_blocks(hidden, targets, take, vocabulary)


def _cross_entropy(logits: Tensor, targets: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The loss (n,) of logits (n, vocabulary) in float32 or wider, and the gradient of its sum in their dtype.

    A few rows at a time, so that the passes over them find them in a CPU's cache.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = logits.new_empty(len(logits), dtype=dtype)
    grad = torch.empty_like(logits) if needs_gradient else None
    rows = max(1, LOGITS_IN_CACHE.get(logits.device.type, logits.numel()) // max(1, logits.shape[1]))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        log_p, wanted = logits[part].log_softmax(-1, dtype=dtype), targets[part, None]
        losses[part] = -log_p.gather(1, wanted)[:, 0]
        if grad is not None:
            probabilities = log_p.exp_()
            grad[part] = probabilities.scatter_add_(1, wanted, probabilities.new_full(wanted.shape, -1))
    return losses, grad


def wide(logits: Tensor) -> Tensor:
    """The same numbers in float32, if they are in less."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def by_autograd(loss: Callable[[Tensor, Tensor], Tensor]) -> BlockLoss:
    """A differentiable loss (n,) of a block and its part of `beside`, for `loss_in_blocks`."""

    def take(block: Tensor, beside: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(needs_gradient):
            leaf = block.detach().requires_grad_(needs_gradient)
            losses = loss(leaf, beside)
            gradient = torch.autograd.grad(losses.sum(), leaf)[0] if needs_gradient else None
        return losses.detach(), gradient

    return take


def loss_in_blocks(hidden: Tensor, beside: Tensor, take: BlockLoss, logits_per_token: int) -> Tensor:
    """A loss for each token (N,); only the gradient of its hidden state is kept for the backward.

    Args:
        hidden: (N, d_h).
        beside: (N, ...), other inputs of each token's loss; they get no gradient.
        take: returns the losses of a block of both, each a function of its own hidden state, with the gradient.
        logits_per_token: determines the size of the blocks.
    """
    losses: Tensor = _LossInBlocks.apply(hidden, beside, take, logits_per_token)  # type: ignore[no-untyped-call]
    return losses


class _LossInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, beside: Tensor, take: BlockLoss, logits_per_token: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for block, wanted in _blocks(hidden, beside, logits_per_token):
            loss, gradient = take(block, wanted, needs_gradient)
            losses.append(loss)
            if gradient is not None:
                gradients.append(gradient)
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
    return max(LEAST_TOKENS, LOGITS_AT_ONCE.get(device, LOGITS_AT_ONCE["cpu"]) // logits_per_token)
