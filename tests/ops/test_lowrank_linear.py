"""lowrank_linear against its plain definition and the merged weights, and what it saves."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracles import assert_as_good_as, draw, gradients, plain_linear
from torch import Generator, Tensor

from gakernels import InputError, lowrank_linear
from gakernels.ops.lowrank_linear import reference

SHAPES = [  # windows, M, d_in, d_out, r
    (1, 1, 1, 1, 1),
    (3, 1, 5, 4, 2),
    (4, 7, 3, 9, 3),
    (5, 6, 11, 2, 13),  # a rank above both sizes is allowed
]
SCALE = 0.37


def inputs(generator: Generator, shape: tuple[int, ...], adapters: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    windows, tokens, d_in, d_out, rank = shape
    return (
        draw(generator, windows, tokens, d_in),
        draw(generator, d_out, d_in),
        draw(generator, adapters, rank, d_in),
        draw(generator, adapters, d_out, rank),
    )


def index_of(kind: str, windows: int) -> tuple[Tensor | None, int]:
    """An adapter_index and the number of adapters."""
    return {
        "own": (None, windows),
        "none": (torch.full((windows,), -1), 2),
        "shared": (torch.full((windows,), 1), 3),
        "mixed": (torch.tensor([2, -1, 0, 2, -1][:windows]), 4),  # repeats, none, and adapters 1 and 3 unused
        "reversed": (torch.arange(windows).flip(0), windows),
    }[kind]


KINDS = ["own", "none", "shared", "mixed", "reversed"]


def plain_indices(index: Tensor | None, windows: int) -> list[int]:
    return list(range(windows)) if index is None else index.tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_both_definitions_in_float64(
    generator: Generator, shape: tuple[int, ...], kind: str, with_bias: bool
) -> None:
    index, adapters = index_of(kind, shape[0])
    x, weight, lora_a, lora_b = inputs(generator, shape, adapters)
    bias = draw(generator, shape[3]) if with_bias else None
    y = lowrank_linear(x, weight, lora_a, lora_b, SCALE, index, bias)
    wanted = plain_linear(x, weight, lora_a, lora_b, SCALE, plain_indices(index, shape[0]), bias)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
    by_reference = reference.lowrank_linear(x, weight, lora_a, lora_b, SCALE, index, bias)
    torch.testing.assert_close(by_reference, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_equals_that_of_both_definitions(
    generator: Generator, shape: tuple[int, ...], kind: str
) -> None:
    index, adapters = index_of(kind, shape[0])
    x, weight, lora_a, lora_b = inputs(generator, shape, adapters)
    indices, bias = plain_indices(index, shape[0]), draw(generator, shape[3])
    upstream = draw(generator, shape[0], shape[1], shape[3])
    ours = gradients(lambda x, a, b: lowrank_linear(x, weight, a, b, SCALE, index, bias), upstream, x, lora_a, lora_b)
    for definition in (
        lambda x, a, b: plain_linear(x, weight, a, b, SCALE, indices, bias),
        lambda x, a, b: reference.lowrank_linear(x, weight, a, b, SCALE, index, bias),
    ):
        wanted = gradients(definition, upstream, x, lora_a, lora_b)
        for mine, theirs in zip(ours, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(generator: Generator, kind: str) -> None:
    index, adapters = index_of(kind, 4)
    x, weight, lora_a, lora_b = inputs(generator, (4, 3, 3, 2, 2), adapters)
    variables = [value.requires_grad_() for value in (x, lora_a, lora_b)]
    assert torch.autograd.gradcheck(lambda x, a, b: lowrank_linear(x, weight, a, b, SCALE, index), variables)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("kind", ["own", "mixed"])
def test_gradients_of_some_inputs_only(generator: Generator, needed: tuple[int, ...], kind: str) -> None:
    index, adapters = index_of(kind, 4)
    x, weight, *factors = inputs(generator, (4, 3, 5, 2, 2), adapters)
    upstream = draw(generator, 4, 3, 2)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lowrank_linear(x, weight, a, b, SCALE, index)

    everything = gradients(function, upstream, x, *factors)
    leaves = [value.clone().requires_grad_(i in needed) for i, value in enumerate((x, *factors))]
    function(*leaves).backward(upstream)
    for i, leaf in enumerate(leaves):
        if i in needed:
            torch.testing.assert_close(leaf.grad, everything[i], rtol=1e-12, atol=1e-12)
        else:
            assert leaf.grad is None


def test_adapters_that_no_window_uses_may_hold_anything(generator: Generator) -> None:
    index, adapters = index_of("mixed", 5)
    x, weight, lora_a, lora_b = inputs(generator, (5, 3, 4, 6, 2), adapters)
    unused = torch.tensor([1, 3])
    spoiled_a, spoiled_b = lora_a.index_fill(0, unused, float("nan")), lora_b.index_fill(0, unused, float("inf"))
    upstream = draw(generator, 5, 3, 6)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lowrank_linear(x, weight, a, b, SCALE, index)

    assert torch.equal(function(x, spoiled_a, spoiled_b), function(x, lora_a, lora_b))
    spoiled = gradients(function, upstream, x, spoiled_a, spoiled_b)
    clean = gradients(function, upstream, x, lora_a, lora_b)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(spoiled, clean, strict=True))
    assert all((gradient[unused] == 0).all() for gradient in spoiled[1:])


def test_windows_without_an_adapter_are_exactly_the_base(generator: Generator) -> None:
    """Also when adapter 0, the one that index -1 could be mistaken for, holds NaN."""
    x, weight, lora_a, lora_b = inputs(generator, (3, 4, 5, 6, 2), 2)
    lora_a[0], lora_b[0] = float("nan"), float("nan")
    index = torch.tensor([-1, 1, -1])
    y = lowrank_linear(x, weight, lora_a, lora_b, SCALE, index)
    base = torch.nn.functional.linear(x, weight)
    assert torch.equal(y[[0, 2]], base[[0, 2]])
    assert y.isfinite().all()
    upstream = draw(generator, 3, 4, 6)
    grads = gradients(lambda x, a, b: lowrank_linear(x, weight, a, b, SCALE, index), upstream, x, lora_a, lora_b)
    assert all(gradient.isfinite().all() for gradient in grads)
    torch.testing.assert_close(grads[0][[0, 2]], (upstream @ weight)[[0, 2]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["own", "mixed"])
def test_no_tokens(generator: Generator, kind: str) -> None:
    index, adapters = index_of(kind, 3)
    x, weight, lora_a, lora_b = inputs(generator, (3, 0, 5, 4, 2), adapters)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lowrank_linear(x, weight, a, b, SCALE, index)

    assert function(x, lora_a, lora_b).shape == (3, 0, 4)
    _, grad_a, grad_b = gradients(function, torch.empty(3, 0, 4, dtype=torch.float64), x, lora_a, lora_b)
    assert (grad_a == 0).all()
    assert (grad_b == 0).all()


@pytest.mark.parametrize("kind", ["own", "mixed"])
def test_inputs_that_are_not_contiguous(generator: Generator, kind: str) -> None:
    index, adapters = index_of(kind, 4)
    values = inputs(generator, (4, 3, 5, 2, 6), adapters)
    strided = [value.mT.contiguous().mT for value in values[1:]]
    strided.insert(0, values[0].permute(2, 0, 1).contiguous().permute(1, 2, 0))
    spread_index = None if index is None else torch.stack([index, index - 1], -1)[:, 0]
    assert not any(value.is_contiguous() for value in strided)
    x, weight, lora_a, lora_b = values
    wanted = lowrank_linear(x, weight, lora_a, lora_b, SCALE, index)
    torch.testing.assert_close(lowrank_linear(*strided, SCALE, spread_index), wanted, rtol=0, atol=1e-12)
    upstream = draw(generator, 3, 4, 2).transpose(0, 1)
    leaves = [strided[0].requires_grad_(), strided[2].requires_grad_(), strided[3].requires_grad_()]
    y = lowrank_linear(leaves[0], strided[1], leaves[1], leaves[2], SCALE, spread_index)
    for mine, theirs in zip(
        torch.autograd.grad(y, leaves, upstream),
        gradients(lambda x, a, b: lowrank_linear(x, weight, a, b, SCALE, index), upstream, x, lora_a, lora_b),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["own", "mixed"])
def test_low_precision_is_as_good_as_plain_pytorch(generator: Generator, dtype: torch.dtype, kind: str) -> None:
    index, adapters = index_of(kind, 5)
    values = [value.to(dtype) / 8 for value in inputs(generator, (5, 33, 64, 48, 7), adapters)]
    x, weight, lora_a, lora_b = values
    bias, upstream = draw(generator, 48, dtype=dtype), draw(generator, 5, 33, 48, dtype=dtype)
    indices = plain_indices(index, 5)

    def run(function: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, ...]:
        x, weight, lora_a, lora_b, bias, upstream = values
        inner = lambda x, a, b: function(x, weight, a, b, 1.5, index, bias)  # noqa: E731
        return inner(x, lora_a, lora_b), *gradients(inner, upstream, x, lora_a, lora_b)

    everything = (x, weight, lora_a, lora_b, bias, upstream)
    exact = run(
        lambda x, w, a, b, s, _, c: plain_linear(x, w, a, b, s, indices, c), *(value.double() for value in everything)
    )
    for mine, plain, true in zip(
        run(lowrank_linear, *everything), run(reference.lowrank_linear, *everything), exact, strict=True
    ):
        assert mine.dtype == dtype
        assert_as_good_as(mine, plain, true)


def test_windows_that_share_an_adapter_are_summed_in_float32() -> None:
    """A bfloat16 sum of ones would stall at 2^8."""
    ones = partial(torch.ones, dtype=torch.bfloat16)
    index = torch.zeros(1024, dtype=torch.int64)

    def function(a: Tensor, b: Tensor) -> Tensor:
        return lowrank_linear(ones(1024, 1, 1), ones(1, 1), a, b, 1.0, index)

    grad_a, grad_b = gradients(function, ones(1024, 1, 1), ones(1, 1, 1), ones(1, 1, 1))
    assert grad_a.item() == grad_b.item() == 1024


def saved_for(x: Tensor, *arguments: object) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lowrank_linear(x, *arguments)
    return saved


def test_the_input_is_saved_only_for_the_gradient_of_lora_a(generator: Generator) -> None:
    x, weight, lora_a, lora_b = inputs(generator, (3, 50, 7, 5, 2), 3)

    def x_is_saved(needs_x: bool, needs_a: bool, needs_b: bool) -> bool:
        leaf = x.clone().requires_grad_(needs_x)
        saved = saved_for(leaf, weight, lora_a.requires_grad_(needs_a), lora_b.requires_grad_(needs_b), SCALE)
        assert all(value.numel() <= x.numel() for value in saved)
        return any(value.data_ptr() == leaf.data_ptr() or value.shape == x.shape for value in saved)

    assert saved_for(x, weight, lora_a, lora_b, SCALE) == []
    assert not x_is_saved(True, False, False)
    assert not x_is_saved(False, False, True)
    assert not x_is_saved(True, False, True)
    assert x_is_saved(False, True, False)
    assert x_is_saved(True, True, True)


def test_a_pass_that_needs_only_dx_saves_nothing_per_token(generator: Generator) -> None:
    x, weight, lora_a, lora_b = inputs(generator, (3, 50, 7, 5, 2), 3)
    saved = saved_for(x.requires_grad_(), weight, lora_a, lora_b, SCALE)
    assert saved  # the weights
    assert all(50 not in value.shape for value in saved)


def test_frozen_weight_and_bias_get_no_gradient_and_must_not_ask_for_one(generator: Generator) -> None:
    x, weight, lora_a, lora_b = inputs(generator, (2, 3, 4, 5, 2), 2)
    bias = draw(generator, 5)
    lowrank_linear(x, weight, lora_a.requires_grad_(), lora_b, SCALE, None, bias).sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    with pytest.raises(InputError, match="weight must be frozen"):
        lowrank_linear(x, weight.clone().requires_grad_(), lora_a, lora_b)
    with pytest.raises(InputError, match="bias must be frozen"):
        lowrank_linear(x, weight, lora_a, lora_b, bias=bias.clone().requires_grad_())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4)}, r"x must have shape \(windows, M, d_in\), but it has \(2, 4\)"),
        ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, "x must be torch.float64 or .*torch.int64"),
        ({"weight": torch.ones(5, 3)}, r"weight must have shape \(d_out, 4\)"),
        ({"weight": torch.ones(5, 4, dtype=torch.float64)}, "weight must be torch.float32 like x"),
        ({"weight": torch.ones(5, 4, device="meta")}, "weight must be on cpu like x"),
        ({"lora_a": torch.ones(3, 2, 4)}, r"lora_a must have shape \(2, r, 4\)"),
        ({"lora_a": torch.ones(2, 2, 5)}, r"lora_a must have shape \(2, r, 4\)"),
        ({"lora_a": torch.ones(2, 2, 4, dtype=torch.bfloat16)}, "lora_a must be torch.float32 like x"),
        ({"lora_b": torch.ones(3, 5, 2)}, r"lora_b must have shape \(2, 5, 2\)"),
        ({"lora_b": torch.ones(2, 5, 3)}, r"lora_b must have shape \(2, 5, 2\)"),
        ({"lora_b": torch.ones(2, 5, 2, dtype=torch.float16)}, "lora_b must be torch.float32 like x"),
        ({"adapter_index": torch.zeros(3, dtype=torch.int64)}, r"adapter_index must have shape \(2,\)"),
        ({"adapter_index": torch.zeros(2)}, "adapter_index must be torch.int64"),
        ({"adapter_index": torch.zeros(2, dtype=torch.int32)}, "adapter_index must be torch.int64"),
        ({"bias": torch.ones(4)}, r"bias must have shape \(5,\)"),
        ({"bias": torch.ones(5, dtype=torch.float64)}, "bias must be torch.float32 like x"),
    ],
)
def test_wrong_input_names_the_argument(change: dict[str, Tensor], message: str) -> None:
    arguments = {
        "x": torch.ones(2, 3, 4),
        "weight": torch.ones(5, 4),
        "lora_a": torch.ones(2, 2, 4),
        "lora_b": torch.ones(2, 5, 2),
    }
    lowrank_linear(**arguments)
    with pytest.raises(InputError, match=message):
        lowrank_linear(**{**arguments, **change})


def test_an_index_into_no_adapters_is_refused() -> None:
    with pytest.raises(InputError, match="lora_a must hold at least one adapter"):
        lowrank_linear(
            torch.ones(1, 1, 2),
            torch.ones(3, 2),
            torch.ones(0, 1, 2),
            torch.ones(0, 3, 1),
            adapter_index=torch.tensor([-1]),
        )
