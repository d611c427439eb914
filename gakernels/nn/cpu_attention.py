"""Causal attention in bfloat16 on CPUs, with a backward two to four times as fast as PyTorch's.

Figures are in docs/training.md under "Attention".
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

PROBABILITIES_AT_ONCE = 1 << 19  # as many numbers as stay in a core's cache between the products


_IN_USE: ContextVar[bool] = ContextVar("gakernels_cpu_attention", default=False)


def same_attention() -> Callable[[], AbstractContextManager[Any]]:
    """What makes a block, whenever it runs, use the attention that is in use now."""
    return CpuAttention if _IN_USE.get() else nullcontext


class CpuAttention(TorchFunctionMode):
    """Inside the block, `scaled_dot_product_attention` runs as `causal_attention` if that applies.

    It applies in bfloat16 on a CPU if a backward follows, to causal attention and to boolean masks in which every token
    attends to something, such as those of padded or packed windows.
    """

    def __enter__(self) -> "CpuAttention":
        self._before = _IN_USE.set(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _IN_USE.reset(self._before)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _serves(*args, **kwargs):
            query, key, value = args
            scale, mask = kwargs.get("scale"), kwargs.get("attn_mask")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            return causal_attention(query, key, value, scale, None if mask is None else mask[:, 0])
        return func(*args, **kwargs)


def _serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    inputs = query, key, value
    return (
        dropout_p == 0
        and all(x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.dim() == 4 for x in inputs)
        and query.shape[2] == key.shape[2]
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in inputs)
        and (is_causal if attn_mask is None else _is_usable(attn_mask, query))
    )


def _is_usable(mask: Tensor, query: Tensor) -> bool:
    batch, _, tokens, _ = query.shape
    same = mask.shape in ((batch, 1, tokens, tokens), (1, 1, tokens, tokens))
    return same and mask.dtype == torch.bool and bool(mask.any(-1).all())


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale Q K^T) V, each token over itself and those before it, or over those that the mask allows.

    Args:
        query: (B, heads, M, d).
        key: (B, groups, M, d); heads is a multiple of groups.
        value: (B, groups, M, d_v).
        scale: of the scores.
        mask: (B or 1, M, M) bool, with a True in every row; None for causal attention.

    Returns:
        (B, heads, M, d_v).
    """
    attended: Tensor = _CausalAttention.apply(query, key, value, scale, mask)  # type: ignore[no-untyped-call]
    return attended


class _CausalAttention(torch.autograd.Function):
    """The backward recomputes the probabilities; they and the scores are rounded to the inputs' dtype."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        shape, groups, ctx.scale = query.shape, key.shape[1], scale
        q, k, v = _fold(query * scale, groups), key.flatten(0, 1), value.flatten(0, 1)
        bias = _bias(mask, k)
        attended = q.new_empty(*q.shape[:-1], v.shape[-1])
        for part, rows in _parts(q, k, groups, bias):
            attended[part] = torch.bmm(_probabilities(q[part], k[part], bias[rows]), v[part])
        ctx.save_for_backward(q, k, v, bias)
        return attended.view(*shape[:-1], v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, bias = ctx.saved_tensors
        batch, heads = grad.shape[:2]
        groups = len(k) // batch
        grad_out = _fold(grad, groups)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part, rows in _parts(q, k, groups, bias):
            p = _probabilities(q[part], k[part], bias[rows])
            grad_v[part] = torch.bmm(p.mT, grad_out[part])
            grad_p = torch.bmm(grad_out[part], v[part].mT)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[part] = torch.bmm(grad_scores, k[part])
            grad_k[part] = torch.bmm(grad_scores.mT, q[part])
        grad_query = (grad_q * ctx.scale).view(batch, heads, *k.shape[1:])
        grad_key, grad_value = grad_k.view(batch, groups, *k.shape[1:]), grad_v.view(batch, groups, *v.shape[1:])
        return grad_query, grad_key, grad_value, None, None


def _fold(heads: Tensor, groups: int) -> Tensor:
    """(B, heads, M, d) as (B groups, heads / groups M, d): the heads that share a key under one another."""
    return heads.reshape(len(heads) * groups, -1, heads.shape[-1])


def _bias(mask: Tensor | None, k: Tensor) -> Tensor:
    """(B or 1, M, M): 0 where a token looks, minus infinity elsewhere."""
    hidden = k.new_ones(1, k.shape[1], k.shape[1], dtype=torch.bool).triu(1) if mask is None else ~mask
    return k.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _parts(q: Tensor, k: Tensor, groups: int, bias: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts of the folded rows, each with its rows of the bias."""
    size = max(1, PROBABILITIES_AT_ONCE // max(1, q.shape[1] * k.shape[1] * groups))
    for start in range(0, len(q) // groups, size):
        rows = slice(start, start + size)
        yield slice(start * groups, (start + size) * groups), rows if len(bias) > 1 else slice(None)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """(n, heads M, M)."""
    scores = torch.bmm(q, k.mT)
    tokens = k.shape[1]
    return scores.view(len(bias), -1, tokens, tokens).add(bias[:, None]).softmax(-1).view_as(scores)
