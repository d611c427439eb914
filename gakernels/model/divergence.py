"""How far one model's next-token distributions are from another's."""

from __future__ import annotations

import torch
from torch import Tensor

from gakernels.model.generative_adapter import GenerativeAdapter
from gakernels.nn.token_loss import by_autograd, loss_in_blocks, wide


def divergences(
    model: GenerativeAdapter, student: Tensor, teacher: Tensor, top_k: int, temperature: float = 1.0
) -> Tensor:
    """The divergence of each token (N,), in blocks; the teacher's states get no gradient.

    Args:
        model: its head turns both into logits.
        student: (N, d_h), last hidden states.
        teacher: (N, d_h), those to come close to.
        top_k: see `divergence`.
        temperature: see `divergence`.
    """

    def loss(ours: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = wide(model.logits(theirs))
        return divergence(wide(model.logits(ours)), wanted, top_k, temperature)

    vocabulary = model.base.config.get_text_config().vocab_size
    return loss_in_blocks(student, teacher, by_autograd(loss), 2 * vocabulary)


def divergence(student: Tensor, teacher: Tensor, top_k: int, temperature: float = 1.0) -> Tensor:
    """temperature^2 KL(teacher || student) (n,) of softmax(logits / temperature), from logits (n, vocabulary).

    With top_k below the vocabulary the tokens that are not among the teacher's top_k count as a single outcome.
    """
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    if top_k < log_p.shape[-1]:
        top = log_p.topk(top_k).indices
        log_p, log_q = (torch.cat([each.gather(-1, top), _rest(each, top)], dim=-1) for each in (log_p, log_q))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def _rest(log_probabilities: Tensor, top: Tensor) -> Tensor:
    """The logarithm (n, 1) of the total probability of all tokens but those given."""
    return log_probabilities.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
