"""Folded windows with padding on the right give the same under every implementation of attention, without a mask."""

from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from tiny import make_model
from torch import Generator, Tensor

from gakernels import GenerativeAdapter

CHUNKS, SEEN = 3, (0, 1, 2, 1, 2, 3)
LENGTHS = (7, 4, 7, 2, 6, 1)


def windows(generator: Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Windows of different lengths; one of each row is empty."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    mask = mask.repeat(rows, 1, 1)
    mask[-1, 1] = False
    return torch.randint(3, 60, mask.shape, generator=generator), mask


def results(model: GenerativeAdapter, ids: Tensor, mask: Tensor, attention: str) -> list[Tensor]:
    """Hidden states of the tokens that are there, the states, and the gradients."""
    model.base.set_attn_implementation(attention)
    hidden, states = model(ids, mask, CHUNKS, SEEN)
    there = hidden[mask]
    gradients = torch.autograd.grad(there.square().mean(), list(model.generators.parameters()))
    return [there.detach(), *(state.detach() for state in states.values()), *gradients]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("rows", [1, 2])
def test_eager_attention_gives_the_same(generator: Generator, family: str, rows: int) -> None:
    model = make_model(family, torch.float64, torch.float64, linears=("o_proj",))
    batch = windows(generator, rows)
    fast, plain = (results(model, *batch, attention) for attention in ("sdpa", "eager"))
    # transformers' eager softmax is in float32, whatever the dtype
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_flash_attention_is_called_once_a_window_and_never_packed(
    generator: Generator, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers takes positions that start again for packed sequences, and a mask for padding to cut out."""
    calls: list[tuple[int, ...]] = []

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        causal: bool = False,
        softmax_scale: float | None = None,
    ) -> Tensor:
        assert causal
        assert not dropout_p
        calls.append(tuple(q.shape))
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    def packed(*arguments: Any, max_seqlen_q: int = 0, max_seqlen_k: int = 0, **options: Any) -> Tensor:
        raise AssertionError("the windows were taken for packed sequences")

    functions = (flash_attn_func, packed, packed, packed, packed)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    model = make_model("llama", torch.float64, torch.float64)
    batch = windows(generator, rows)
    wanted = results(model, *batch, "sdpa")
    monkeypatch.setattr(model.base.config, "_attn_implementation", "flash_attention_2", raising=False)
    hidden, _ = model(*batch, CHUNKS, SEEN)
    torch.testing.assert_close(hidden[batch[1]], wanted[0])
    assert calls[0] == (rows, max(LENGTHS), 4, 8)  # the first windows alone
    assert set(calls[len(calls) // 2 :]) == {(rows * (len(SEEN) - 1), max(LENGTHS), 4, 8)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_attention_gives_the_same_on_a_gpu(generator: Generator) -> None:
    pytest.importorskip("flash_attn")
    model = make_model("llama", torch.bfloat16).to("cuda")
    batch = [tensor.cuda() for tensor in windows(generator, 2)]
    fast, plain = results(model, *batch, "flash_attention_2"), results(model, *batch, "sdpa")
    wide = results(model.float(), *batch, "sdpa")
    for ours, theirs, exact in zip(fast, plain, wide, strict=True):
        error, allowed = ((found.float() - exact).norm() for found in (ours, theirs))
        assert error <= 3 * allowed + 0.01 * exact.norm()
