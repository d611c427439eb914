"""Counting the matrix products that really run, attention included."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gakernels.nn import adapted_linear, adapter_generator
from gakernels.ops.context_state import eager as context_state
from gakernels.ops.low_rank_polar import eager as low_rank_polar
from gakernels.ops.lowrank_linear import eager as lowrank_linear

aten = torch.ops.aten


def attention(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, attn_mask: Any = None, **_: Any) -> int:
    """Two products for every pair that the mask leaves. (PyTorch has no rule for attention on a CPU.)"""
    causal = len(arguments) > 1 and arguments[1]
    new, all_ = query.shape[-2], key.shape[-2]
    if attn_mask is not None:
        assert not causal
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1e4
        pairs = int(seen.expand(*query.shape[:-1], all_).sum())
    else:
        assert new == all_ if causal else new == 1
        mask = torch.ones(new, all_, dtype=torch.bool).tril() if causal else torch.ones(new, all_)
        pairs = int(mask.sum()) * query.shape[:-2].numel()
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> int:
    """Four products: the gradients of the weights, the values, the queries and the keys."""
    *_, causal = arguments[:4]  # out, logsumexp, dropout, is_causal
    return 2 * attention(query, key, value, 0.0, causal, attn_mask=options.get("attn_mask"))


def added_product(_: Any, left: torch.Size, right: torch.Size, **__: Any) -> int:
    return 2 * left.numel() * right[-1]


def product(left: torch.Size, right: torch.Size, **_: Any) -> int:
    """Not that of a column and a row: transformers before 5.17 multiplies positions and frequencies so."""
    return 2 * left.numel() * right[-1] if left[-1] > 1 else 0


def by_values(rule: Any) -> Any:
    """FlopCounterMode hands such a rule the tensors, not only their shapes."""

    def raw(*arguments: Any, out_val: Any = None, **options: Any) -> int:
        return rule(*arguments, **options)

    raw._get_raw = True
    return raw


PRODUCTS = {aten.bmm: product}
MAPPING = {
    **PRODUCTS,
    aten.addmm_: added_product,  # PyTorch has rules for these only where they are not in place
    aten.baddbmm_: added_product,
    aten.mv: lambda matrix, *_, **__: 2 * matrix.numel(),
    aten._scaled_dot_product_flash_attention_for_cpu: by_values(attention),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: by_values(attention_backward),
}


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts what runs in the block."""
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        yield counter


def make_transparent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's operations as plain PyTorch, for inference: as operators they would hide their products."""

    def states(hidden: Tensor, a2: Tensor, b1: Tensor, mask: Any = None, initial: Any = None) -> Tensor:
        return context_state.forward(hidden, a2, b1, mask, initial)[0]

    def polar(states: Tensor, sketch: Tensor, power_iterations: int, damping: float) -> tuple[Tensor, Tensor]:
        return low_rank_polar.forward(states, sketch, power_iterations, damping)[:2]

    def linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, index: Any, bias: Any) -> Tensor:
        return lowrank_linear.forward(x, weight, a, b, scale, index, bias)[0]

    monkeypatch.setattr(adapter_generator, "context_state", states)
    monkeypatch.setattr(adapter_generator, "low_rank_polar", polar)
    monkeypatch.setattr(adapted_linear, "lowrank_linear", linear)
