"""Two frozen linear layers of one input: the values of the layers, and a gradient as good as PyTorch's sum of two."""

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor, nn

from gakernels.nn import AdaptedLinear
from gakernels.nn.frozen_pair import can_pair, frozen_pair


def draw(generator: Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def separate(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return nn.functional.linear(x, first), nn.functional.linear(x, second)


def gradient(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, *rest: Tensor) -> Tensor:
    first, second, *upstream = rest
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf, first, second), leaf, upstream)[0]


def errors(*values: Tensor) -> tuple[float, float]:
    """||gradient - exact|| / ||exact||, of the pair and of PyTorch's sum of two gradients."""
    exact = gradient(separate, *(value.double() for value in values))
    size = exact.norm().clamp(min=1e-300)
    ours, usual = (((gradient(f, *values) - exact).norm() / size).item() for f in (frozen_pair, separate))
    return ours, usual


def inputs(generator: Generator, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, both weights, and both upstream gradients."""
    outputs = [(*shape[:-1], 50)] * 2
    sizes = [shape, (50, shape[-1]), (50, shape[-1]), *outputs]
    return [draw(generator, *size, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(33,), (7, 33), (2, 65, 40), (0, 33)])
def test_values_and_gradient(generator: Generator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, first, second, *upstream = inputs(generator, shape, dtype)
    for mine, wanted in zip(frozen_pair(x, first, second), separate(x, first, second), strict=True):
        assert torch.equal(mine, wanted)
    values = (x, first, second, *upstream)
    mine, plain = gradient(frozen_pair, *values), gradient(separate, *values)
    assert (mine.shape, mine.dtype) == (plain.shape, plain.dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(mine, plain)
    else:
        error, usual = errors(*values)
        assert error <= 2 * usual + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounding_less(generator: Generator, dtype: torch.dtype) -> None:
    error, usual = errors(*inputs(generator, (500, 100), dtype))
    assert error < 0.95 * usual


def test_upstream_gradients_with_any_strides(generator: Generator) -> None:
    x, first, second, *upstream = inputs(generator, (3, 4, 10), torch.float64)
    wanted = gradient(separate, x, first, second, *upstream)
    strided = [one.permute(2, 0, 1).contiguous().permute(1, 2, 0) for one in upstream]
    torch.testing.assert_close(gradient(frozen_pair, x, first, second, *strided), wanted)


def test_under_autocast(generator: Generator) -> None:
    values = inputs(generator, (3, 40), torch.float32)
    low = [value.bfloat16() for value in values]
    leaf = values[0].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        pair = frozen_pair(leaf, *values[1:3])
        for mine, wanted in zip(pair, separate(*low[:3]), strict=True):
            assert torch.equal(mine, wanted)
        found = torch.autograd.grad(pair, leaf, low[3:])[0]
    assert torch.equal(found, gradient(frozen_pair, *low).float())


def test_nothing_but_the_weights_is_kept(generator: Generator) -> None:
    x, first, second, *_ = inputs(generator, (3, 40), torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        frozen_pair(x.requires_grad_(), first, second)
    assert kept == [first.data_ptr(), second.data_ptr()]


def test_which_layers_can() -> None:
    def frozen(**options: bool) -> nn.Linear:
        return nn.Linear(4, 6, **{"bias": False, **options}).requires_grad_(False)

    assert can_pair(frozen())
    assert not can_pair(frozen(bias=True))
    assert not can_pair(nn.Linear(4, 6, bias=False))
    assert not can_pair(AdaptedLinear.from_linear(frozen()))
    hooked = frozen()
    hooked.register_forward_hook(lambda *_: None)
    assert not can_pair(hooked)
    computed = nn.utils.parametrizations.weight_norm(frozen())
    assert not can_pair(computed)
