"""Causal attention on CPUs against its definition in float64, and where it takes the place of PyTorch's."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gakernels.nn import cpu_attention
from gakernels.nn.cpu_attention import CpuAttention, causal_attention


def inputs(
    generator: torch.Generator, batch: int, heads: int, groups: int, tokens: int, dtype: torch.dtype
) -> list[Tensor]:
    """Query, key and value as attention layers give them: heads and tokens exchanged in memory."""
    sizes = (heads, 8), (groups, 8), (groups, 12)
    drawn = [torch.randn(batch, tokens, n, d, generator=generator, dtype=torch.float64) for n, d in sizes]
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in drawn]


def definition(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax over the scores of a token and those before it, or those that a mask names, in float64."""
    q, k, v = query.double(), key.double(), value.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale
    hidden = torch.arange(q.shape[2])[:, None] < torch.arange(q.shape[2]) if mask is None else ~mask[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def value_and_gradients(function: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    value = function(*leaves)
    return [value, *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


SHAPES = [(1, 1, 1, 1), (2, 3, 3, 5), (3, 6, 2, 17), (2, 4, 1, 33)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("at_once", [1, 700, 1 << 20])
def test_value_and_gradients_are_those_of_the_definition(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int], at_once: int
) -> None:
    monkeypatch.setattr(cpu_attention, "PROBABILITIES_AT_ONCE", at_once)
    leaves = inputs(generator, *shape, torch.float64)
    upstream = torch.randn(*leaves[0].shape[:-1], 12, generator=generator, dtype=torch.float64)
    ours = value_and_gradients(lambda q, k, v: causal_attention(q, k, v, 0.3), leaves, upstream)
    wanted = value_and_gradients(lambda q, k, v: definition(q, k, v, 0.3), leaves, upstream)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("at_once", [1, 700, 1 << 20])
@pytest.mark.parametrize("same", [True, False])
def test_a_mask_says_what_each_token_attends_to(
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int, int],
    at_once: int,
    same: bool,
) -> None:
    monkeypatch.setattr(cpu_attention, "PROBABILITIES_AT_ONCE", at_once)
    leaves = inputs(generator, *shape, torch.float64)
    upstream = torch.randn(*leaves[0].shape[:-1], 12, generator=generator, dtype=torch.float64)
    tokens = shape[-1]
    mask = torch.rand(1 if same else shape[0], tokens, tokens, generator=generator) < 0.5
    mask |= torch.eye(tokens, dtype=torch.bool)
    ours = value_and_gradients(lambda q, k, v: causal_attention(q, k, v, 0.3, mask), leaves, upstream)
    wanted = value_and_gradients(lambda q, k, v: definition(q, k, v, 0.3, mask), leaves, upstream)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 6, 2, 64), (2, 4, 4, 33)])
def test_in_bfloat16_it_is_about_as_good_as_plain_pytorch(
    generator: torch.Generator, shape: tuple[int, int, int, int]
) -> None:
    leaves = inputs(generator, *shape, torch.bfloat16)
    upstream = torch.randn(*leaves[0].shape[:-1], 12, generator=generator, dtype=torch.float64)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same steps, one operation each, in bfloat16."""
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = (query * 0.3) @ key.mT
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value

    ours = value_and_gradients(lambda q, k, v: causal_attention(q, k, v, 0.3), leaves, upstream)
    theirs = value_and_gradients(plain, leaves, upstream)
    exact = value_and_gradients(lambda q, k, v: definition(q, k, v, 0.3), leaves, upstream.bfloat16())
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert (one.double() - truth).norm() <= 2 * (other.double() - truth).norm()


def attend(generator: torch.Generator, dtype: torch.dtype, requires_grad: bool = True, **options: object) -> list[str]:
    """The kinds of attention in the graph of a call within `CpuAttention`."""
    leaves = inputs(generator, 2, 4, 2, 9, dtype)
    leaves = [x.detach().requires_grad_(requires_grad) for x in leaves]
    with CpuAttention():
        attended = F.scaled_dot_product_attention(*leaves, enable_gqa=True, **options)
    return [] if attended.grad_fn is None else [attended.grad_fn.name()]


def test_it_stands_in_where_it_serves(generator: torch.Generator) -> None:
    assert attend(generator, torch.bfloat16, is_causal=True) == ["_CausalAttentionBackward"]
    for dtype, options in ((torch.float32, {"is_causal": True}), (torch.bfloat16, {})):
        (kind,) = attend(generator, dtype, **options)
        assert "CausalAttention" not in kind
    assert attend(generator, torch.bfloat16, requires_grad=False, is_causal=True) == []
    whole = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    assert attend(generator, torch.bfloat16, attn_mask=whole) == ["_CausalAttentionBackward"]
    blind = whole.clone()
    blind[1, 0, 3] = False  # such a token has no softmax, and PyTorch makes it zero
    for mask in (blind, whole.bfloat16(), whole.expand(2, 4, 9, 9)):
        (kind,) = attend(generator, torch.bfloat16, attn_mask=mask)
        assert "CausalAttention" not in kind


def test_it_computes_what_the_call_asks_for(generator: torch.Generator) -> None:
    leaves = inputs(generator, 2, 4, 2, 9, torch.bfloat16)
    with CpuAttention():
        scaled = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.7, enable_gqa=True)
        default = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        mask = torch.rand(2, 1, 9, 9, generator=generator) < 0.5
        mask |= torch.eye(9, dtype=torch.bool)
        masked = F.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(masked.double(), definition(*leaves, 8**-0.5, mask[:, 0]), rtol=0.05, atol=0.05)
    for ours, scale in ((scaled, 0.7), (default, 8**-0.5)):
        assert "CausalAttention" in ours.grad_fn.name()
        torch.testing.assert_close(ours.double(), definition(*leaves, scale), rtol=0.05, atol=0.05)
