"""The adapters of a frozen layer, plain and compact, and the low-rank term that they add to its output."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gakernels.errors import InputError
from gakernels.ops.lowrank_linear import eager


@dataclass(frozen=True)
class LowRankFactors:
    """The adapters that an `AdaptedLinear` uses: scale lora_B[i] lora_A[i] for adapter i.

    Attributes:
        lora_a: (adapters, r, d_in).
        lora_b: (adapters, d_out, r).
        scale: factor of the low-rank term.
        adapter_index: (rows,) int64, the adapter of each row of the batch, -1 for none. None: a single adapter serves
            all rows, and n adapters serve n equal groups of consecutive rows.
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    adapter_index: Tensor | None = None


@dataclass(frozen=True)
class CompactFactors:
    """A different adapter for each row, as scale A1 U_i V_i^T B2 with A1 and B2 shared; never multiplied out.

    Attributes:
        output_map: A1 (d_out, d_r).
        input_map: B2 (d_r, d_in).
        left: U (rows, d_r, r), zero for a row without an adapter.
        right: V (rows, d_r, r).
        scale: factor of the low-rank term.
    """

    output_map: Tensor
    input_map: Tensor
    left: Tensor
    right: Tensor
    scale: float

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the low-rank term of x (rows, ..., d_in) to y (rows, ..., d_out), in place.

        The maps are one matrix product each for all rows; the rows' own factors are two thin batched ones between them.

        Raises:
            InputError: the batch has another number of rows than there are factors.
        """
        rows = self.left.shape[0]
        _check_rows(x, rows)
        wide = torch.bmm(F.linear(x.reshape(rows, -1, x.shape[-1]), self.input_map), self.right)
        wide = torch.bmm(wide, self.left.mT).view(-1, self.left.shape[1])
        y.view(-1, y.shape[-1]).addmm_(wide, self.output_map.mT, alpha=self.scale)
        return y


Factors = LowRankFactors | CompactFactors | None


def as_windows(x: Tensor, factors: LowRankFactors) -> tuple[Tensor, Tensor | None]:
    """Shape the input as (windows, M, d_in) for `lowrank_linear`, with the index of each window's adapter."""
    adapters, rows = factors.lora_a.shape[0], x.shape[0]
    if factors.adapter_index is not None:
        rows = factors.adapter_index.shape[0]
        _check_rows(x, rows)
        return x.reshape(rows, -1, x.shape[-1]), factors.adapter_index.to(x.device, torch.int64)
    if rows % adapters:
        raise InputError(f"the rows of the batch must be a multiple of the {adapters} adapters, but there are {rows}")
    return x.reshape(adapters, -1, x.shape[-1]), None


def _check_rows(x: Tensor, rows: int) -> None:
    """Raises: InputError: the input is neither a batch of that many rows nor that batch flattened."""
    flattened = x.dim() == 2 and x.shape[0] % rows == 0
    if x.shape[0] != rows and not flattened:
        raise InputError(f"the batch must have {rows} rows, one for each adapter, but it has {x.shape[0]}")


def add_low_rank_term(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, adapter_index: Tensor | None
) -> Tensor:
    """y + scale lora_B (lora_A x), in the dtype of y: `lowrank_linear` with the frozen product computed elsewhere.

    The backward keeps x only if lora_a needs a gradient, and lora_A x only if lora_b does.

    Args:
        y: (windows, M, d_out).
        x: (windows, M, d_in).
        lora_a: (adapters, r, d_in).
        lora_b: (adapters, d_out, r).
        scale: factor of the term.
        adapter_index: (windows,) int64, the adapter of each window, -1 for none; None: window i uses adapter i.
    """
    x, lora_a, lora_b = (tensor.to(y.dtype) for tensor in (x, lora_a, lora_b))
    total: Tensor = _LowRankTerm.apply(y, x, lora_a, lora_b, scale, adapter_index)  # type: ignore[no-untyped-call]
    return total


class _LowRankTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, adapter_index: Tensor | None
    ) -> Tensor:
        _, ctx.needs_x, needs_a, needs_b = ctx.needs_input_grad[:4]
        total, z = eager.with_term(y, x, lora_a, lora_b, scale, adapter_index)
        ctx.scale = scale
        ctx.save_for_backward(x if needs_a else None, z if needs_b else None, lora_a, lora_b, adapter_index)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, lora_a, lora_b, adapter_index = ctx.saved_tensors
        needs = (ctx.needs_x, x is not None, z is not None)
        grads = eager.backward(grad, x, z, None, lora_a, lora_b, ctx.scale, adapter_index, ctx.needs_x)
        grad_x, grad_a, grad_b = (part if need else None for part, need in zip(grads, needs, strict=True))
        return grad, grad_x, grad_a, grad_b, None, None
