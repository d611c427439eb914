"""Rows of numbers in 8-bit floating point, each row with its own scale, and their products."""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from gakernels.ops import autocast

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
MANTISSA = 0x7FFFFF  # the bits of float32 that hold it
MULTIPLE = 16  # sizes that the matrix units of a GPU take
FAST_ACCUMULATION = True  # on a GPU: sums stay in the matrix unit's own registers


class Float8Rows(NamedTuple):
    """A matrix as diag(scale) values.

    Attributes:
        values: (rows, columns), 8-bit floating point.
        scale: (rows, 1) float32, powers of two.
    """

    values: Tensor
    scale: Tensor


def quantize_rows(x: Tensor, dtype: torch.dtype = E4M3, factor: Tensor | None = None) -> Float8Rows:
    """Round a matrix, or x diag(factor), to 8 bits, with the least power of two as the scale of a row that avoids
    overflow.

    Multiplying by a power of two is exact, so with bfloat16 everything before the rounding stays bfloat16. A row with
    an infinity or a NaN gives NaN in products; a row of zeros gives zeros.

    Args:
        x: (rows, columns), floating point.
        dtype: `float8_e4m3fn` (3 bits of mantissa) or `float8_e5m2` (2 bits, a wider range).
        factor: (columns,) float32, powers of two.
    """
    wide = x if x.dtype == torch.bfloat16 else x.float()
    wide = wide if factor is None else wide * factor.to(wide.dtype)
    largest = torch.linalg.vector_norm(wide, float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scale = _up_to_power_of_two(largest / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    return Float8Rows((wide * scale.reciprocal().to(wide.dtype)).to(dtype), scale)


def _up_to_power_of_two(x: Tensor) -> Tensor:
    """The least powers of two that are not below numbers >= 0 (float32), by their bits."""
    return ((x.view(torch.int32) + MANTISSA) & ~MANTISSA).view(torch.float32)


def product(left: Float8Rows, right: Float8Rows, dtype: torch.dtype) -> Tensor:
    """left right^T (rows, other rows) of matrices with equal numbers of columns, in the given dtype."""
    if len(left.values) == 0:
        return left.scale.new_empty(0, len(right.values), dtype=dtype)
    return _product(left.values, right.values.t(), left.scale, right.scale.t(), dtype)


@autocast.without  # which would round what a CPU multiplies
def _product(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
    if not left.is_cuda:  # PyTorch 2.11 knows no scales of rows there, and later versions do just this
        return autocast.to_dtype((left.float() @ right.float()) * left_scale * right_scale, dtype)
    return torch._scaled_mm(left, right, left_scale, right_scale, out_dtype=dtype, use_fast_accum=FAST_ACCUMULATION)


class LastRows:
    """Caches the last quantised rows, so that the input of q, k and v, or of gate and up, is quantised once."""

    def __init__(self) -> None:
        self._entry: tuple[weakref.ref[Tensor], int, Float8Rows] | None = None

    def of(self, x: Tensor) -> Float8Rows:
        """`quantize_rows` of x (..., columns), as a matrix."""
        if torch.compiler.is_compiling() or x.is_inference():  # the compiler sees by itself what is computed twice
            return quantize_rows(x.detach().flatten(0, -2))
        entry = self._entry
        if entry is None or entry[0]() is not x or entry[1] != x._version:
            entry = weakref.ref(x), x._version, quantize_rows(x.detach().flatten(0, -2))
            self._entry = entry
        return entry[2]


last_rows = LastRows()
