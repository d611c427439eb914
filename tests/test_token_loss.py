"""token_loss against PyTorch's cross-entropy on all logits at once."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gakernels.nn import token_loss as blocks
from gakernels.nn.token_loss import token_loss

VOCABULARY, WIDTH = 11, 6


def inputs(generator: Generator, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, targets, the weight of a head, and an upstream gradient for each token."""
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return hidden, targets, weight, torch.randn(tokens, generator=generator, dtype=torch.float64)


def heads(weight: Tensor) -> list[Callable[[Tensor], Tensor]]:
    return [lambda h: h @ weight.mT, lambda h: 3 * torch.tanh(2 * h @ weight.mT / 3)]


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 7, 12])
@pytest.mark.parametrize("kind", [0, 1])
def test_loss_and_gradient_in_blocks(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, tokens: int, kind: int
) -> None:
    monkeypatch.setitem(blocks.LOGITS_AT_ONCE, "cpu", 4 * VOCABULARY + 3)  # four tokens at a time
    monkeypatch.setattr(blocks, "LEAST_TOKENS", 1)
    monkeypatch.setitem(blocks.LOGITS_IN_CACHE, "cpu", 3 * VOCABULARY)  # three rows of them
    hidden, targets, weight, upstream = inputs(generator, tokens, torch.float64)
    head, sizes = heads(weight)[kind], []

    def counting(block: Tensor) -> Tensor:
        sizes.append(len(block))
        return head(block)

    leaf, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ours = token_loss(leaf, targets, counting, VOCABULARY)
    assert max(sizes) <= 4
    assert sum(sizes) == tokens
    wanted = F.cross_entropy(head(plain), targets, reduction="none")
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(ours, leaf, upstream)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, plain, upstream)[0], rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(token_loss(hidden, targets, head, VOCABULARY), wanted, rtol=1e-12, atol=1e-12)


def test_gradcheck(generator: Generator) -> None:
    hidden, targets, weight, _ = inputs(generator, 5, torch.float64)
    head = heads(weight)[1]
    assert torch.autograd.gradcheck(lambda h: token_loss(h, targets, head, VOCABULARY), hidden.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_give_a_float32_loss(generator: Generator, dtype: torch.dtype) -> None:
    hidden, targets, weight, upstream = inputs(generator, 9, dtype)
    leaf, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ours = token_loss(leaf, targets, heads(weight)[0], VOCABULARY)
    wanted = F.cross_entropy((plain @ weight.mT).float(), targets, reduction="none")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, wanted)
    (gradient,) = torch.autograd.grad(ours, leaf, upstream.float())
    (plain_gradient,) = torch.autograd.grad(wanted, plain, upstream.float())
    assert gradient.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps * plain_gradient.double().norm()
    assert (gradient.double() - plain_gradient.double()).norm() <= rounding


def test_a_frozen_graph_needs_no_gradient(generator: Generator) -> None:
    hidden, targets, weight, _ = inputs(generator, 5, torch.float32)
    assert not token_loss(hidden, targets, heads(weight)[0], VOCABULARY).requires_grad
