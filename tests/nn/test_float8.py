"""Rows in 8 bits against a table of all 8-bit numbers."""

import pytest
import torch
from emulation import codes, nearest, rounded
from torch import Generator

from gakernels.nn.float8 import E4M3, E5M2, LastRows, product, quantize_rows

TYPES = [E4M3, E5M2]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_factor", [False, True])
def test_every_number_goes_to_the_nearest(
    generator: Generator, dtype: torch.dtype, wide: torch.dtype, with_factor: bool
) -> None:
    rows = torch.randn(40, 33, generator=generator) * torch.exp(2 * torch.randn(40, 1, generator=generator))
    x = rows.to(wide)
    factor = torch.exp2(torch.randint(-9, 3, (33,), generator=generator)).float() if with_factor else None
    ours = quantize_rows(x, dtype, factor)
    assert ours.values.dtype == dtype
    assert ours.scale.shape == (40, 1)
    assert torch.equal(ours.values.double() * ours.scale.double(), rounded(x, dtype, factor))
    filled = ours.values.float().abs().amax(-1) / torch.finfo(dtype).max
    assert ((filled > 0.49) & (filled <= 1)).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_ties_go_to_even(dtype: torch.dtype) -> None:
    table = codes(dtype)
    between = (table[1:] + table[:-1]) / 2  # exact in float32
    row = torch.cat([between, table[-1:]]).float()[None]  # the largest number makes the scale one
    ours = quantize_rows(row, dtype)
    assert ours.scale.item() == 1
    assert torch.equal(ours.values[0, :-1].double(), nearest(between, dtype))
    assert (ours.values[0, :-1].view(torch.uint8) & 1 == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_on_a_cpu_sum_in_float32(generator: Generator, dtype: torch.dtype) -> None:
    left, right = (quantize_rows(torch.randn(rows, 48, generator=generator)) for rows in (5, 32))
    exact = (left.values.double() * left.scale) @ (right.values.double() * right.scale).mT
    ours = product(left, right, dtype)
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() <= (torch.finfo(dtype).eps + 1e-6) * exact.norm()
    try:
        theirs = torch._scaled_mm(left.values, right.values.t(), left.scale, right.scale.t(), out_dtype=dtype)
    except RuntimeError:
        pytest.skip("this PyTorch has no scales of rows on a CPU to compare with")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_gives_nan_in_its_row_alone(generator: Generator, bad: float, wide: torch.dtype) -> None:
    x = torch.randn(3, 16, generator=generator).to(wide)
    x[1, 5] = bad
    weight = quantize_rows(torch.randn(7, 16, generator=generator))
    y = product(quantize_rows(x), weight, torch.float32)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_rows_of_zeros_and_of_tiny_numbers() -> None:
    x = torch.stack([torch.zeros(16), torch.full((16,), 1e-40), torch.full((16,), 1e-30)])
    ours = quantize_rows(x)
    back = ours.values.float() * ours.scale
    assert torch.equal(back[0], x[0])
    assert (back[1].abs() <= 2e-40).all()
    torch.testing.assert_close(back[2], x[2])


def test_the_last_rows_are_made_once_and_never_stale(generator: Generator) -> None:
    last, x = LastRows(), torch.randn(2, 3, 16, generator=generator)
    first = last.of(x)
    assert first.values.shape == (6, 16)
    assert last.of(x).values is first.values
    assert torch.equal(last.of(x.clone()).values.float(), first.values.float())
    x.mul_(torch.rand(16, generator=generator))
    wanted = quantize_rows(x.flatten(0, 1))
    assert torch.equal(last.of(x).values.float(), wanted.values.float())
    with torch.inference_mode():
        inside = torch.randn(4, 16)
        before = last.of(inside).values.float()
        inside.mul_(torch.rand(16))
        assert not torch.equal(last.of(inside).values.float(), before)


def test_the_last_rows_keep_no_input_alive(generator: Generator) -> None:
    import weakref

    last, x = LastRows(), torch.randn(2, 16, generator=generator)
    last.of(x)
    watched = weakref.ref(x)
    del x
    assert watched() is None
