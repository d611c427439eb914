"""AdaptedLinear with a compact adapter per row, against the definition in float64."""

import pytest
import torch
from torch import Generator, Tensor, nn

from gakernels import InputError
from gakernels.nn import AdaptedLinear, CompactFactors

ROWS, D_IN, D_OUT, D_R, RANK = 5, 12, 7, 6, 3


def draw(generator: Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make(generator: Generator, bias: bool, dtype: torch.dtype) -> AdaptedLinear:
    linear = AdaptedLinear.from_linear(nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype))
    sizes = ((D_OUT, D_R), (D_R, D_IN), (ROWS, D_R, RANK), (ROWS, D_R, RANK))
    linear.factors = CompactFactors(*(draw(generator, *size, dtype=dtype) for size in sizes), scale=0.7)
    return linear


def defined(linear: AdaptedLinear, x: Tensor) -> Tensor:
    """y_i = W x_i + b + scale A1 U_i V_i^T B2 x_i, row by row, multiplied out, in float64."""
    factors = linear.factors
    rows = []
    for row in range(ROWS):
        delta = factors.output_map.double() @ factors.left[row].double() @ factors.right[row].double().mT
        weight = linear.weight.double() + factors.scale * delta @ factors.input_map.double()
        rows.append(x[row].double() @ weight.mT + (0 if linear.bias is None else linear.bias.double()))
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(ROWS, D_IN), (ROWS, 1, D_IN), (ROWS, 4, D_IN), (ROWS, 2, 3, D_IN), (ROWS, 0, D_IN)])
def test_each_row_has_its_own(generator: Generator, shape: tuple[int, ...], bias: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        linear, x = make(generator, bias, dtype), draw(generator, *shape, dtype=dtype)
        y = linear(x)
        assert (y.shape, y.dtype) == ((*shape[:-1], D_OUT), dtype)
        torch.testing.assert_close(y.double(), defined(linear, x), rtol=tolerance, atol=tolerance)


def test_in_bfloat16_the_error_is_that_of_bfloat16(generator: Generator) -> None:
    linear, x = make(generator, True, torch.bfloat16), draw(generator, ROWS, 4, D_IN, dtype=torch.bfloat16)
    expected = defined(linear, x)
    assert (linear(x).double() - expected).norm() / expected.norm() < 2e-2  # four products, each rounded to 2^-9


def test_a_row_of_zeros_is_the_plain_layer(generator: Generator) -> None:
    linear, x = make(generator, True, torch.float32), draw(generator, ROWS, 4, D_IN, dtype=torch.float32)
    linear.factors.left[2] = 0
    y, linear.factors = linear(x), None
    plain = linear(x)
    assert torch.equal(y[2], plain[2])
    assert (y[1] - plain[1]).abs().max() > 1e-2


def test_the_rows_must_fit(generator: Generator) -> None:
    linear = make(generator, False, torch.float32)
    with pytest.raises(InputError, match="must have 5 rows"):
        linear(torch.zeros(ROWS + 1, 4, D_IN))
