"""The Triton kernels of lowrank_linear against float64 definitions, on a GPU or in Triton's interpreter."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from oracles import SumsInOrder, assert_as_good_as, draw, gradients, plain_linear
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from gakernels import lowrank_linear
from gakernels.errors import BackendError
from gakernels.ops import launching
from gakernels.ops.dispatch import module
from gakernels.ops.lowrank_linear import reference

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("triton_backend")]

SCALE = 0.37
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = {  # windows, M, d_in, d_out, r, adapter_index, adapters, bias. Tiles are up to 128 x 256 x 64.
    "tails": ((3, 130, 80, 272, 48), [2, -1, 0], 4, True),
    "odd sizes": ((3, 70, 69, 75, 20), [1, -1, 1], 2, False),  # not copied 16 bytes at a time: smaller tiles
    "own adapters": ((2, 64, 128, 96, 16), None, 2, False),
    "one token": ((3, 1, 24, 20, 5), [1, 1, -1], 2, True),
    "sums in shares": ((2, 520, 528, 32, 16), [1, 1], 2, False),  # nine blocks of M and of d_in
    "rank above a block": ((2, 9, 48, 32, 144), [0, 0], 1, True),
}


def inputs(
    generator: Generator, shape: tuple[int, ...], adapters: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, lora_a, lora_b, bias: every term of y of the same order."""
    windows, tokens, d_in, d_out, rank = shape
    values = (
        draw(generator, windows, tokens, d_in),
        draw(generator, d_out, d_in) / d_in**0.5,
        draw(generator, adapters, rank, d_in) / d_in**0.5,
        draw(generator, adapters, d_out, rank) / rank**0.5,
        draw(generator, d_out),
    )
    return tuple(value.to(device, dtype) for value in values)  # type: ignore[return-value]


def index_on(device: torch.device, index: list[int] | None) -> Tensor | None:
    return None if index is None else torch.tensor(index, device=device)


def all_results(
    function: Callable[..., Tensor], upstream: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The output and the gradients of x, lora_a and lora_b."""

    def of_variables(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return function(x, weight, a, b, SCALE, *rest)

    return of_variables(x, a, b), *gradients(of_variables, upstream, x, a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_as_good_as_plain_pytorch(
    generator: Generator, device: torch.device, case: str, dtype: torch.dtype
) -> None:
    shape, index, adapters, with_bias = CASES[case]
    *values, bias = inputs(generator, shape, adapters, dtype, device)
    upstream = draw(generator, *shape[:2], shape[3], dtype=dtype).to(device)
    rest = index_on(device, index), bias if with_bias else None
    ours = all_results(lowrank_linear, upstream, *values, *rest)
    in_order = dtype == torch.float32  # elsewhere the rounding of the results hides that of the sums
    with SumsInOrder() if in_order else nullcontext():
        plain = all_results(reference.lowrank_linear, upstream, *values, *rest)
    wide = [None if value is None else value.double() for value in (upstream, *values, rest[1])]
    indices = list(range(shape[0])) if index is None else index

    def definition(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        return plain_linear(x, weight, a, b, scale, indices, bias)

    exact = all_results(definition, *wide)
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert mine.dtype == dtype
        assert mine.is_contiguous()
        assert_as_good_as(mine, theirs, true, 1.25 if in_order else 2)


@pytest.mark.parametrize("case", ["tails", "one token", "sums in shares"])
def test_the_shrunk_input_and_nothing_unwritten(generator: Generator, device: torch.device, case: str) -> None:
    """z is what eager saves; zero for a window without an adapter."""
    shape, index, adapters, _ = CASES[case]
    *values, bias = inputs(generator, shape, adapters, torch.float32, device)
    arguments = (*values, SCALE, index_on(device, index), bias)
    _, z = module("lowrank_linear", "triton").forward(*arguments)
    _, wanted = module("lowrank_linear", "eager").forward(*arguments)
    torch.testing.assert_close(z, wanted, rtol=1e-5, atol=1e-5)


def test_what_no_window_uses_is_not_read(generator: Generator, device: torch.device) -> None:
    """Unused adapters, and those that index -1 could be mistaken for, hold NaN; their gradients are exact zeros."""
    shape, index = (4, 20, 24, 40, 18), index_on(device, [-1, 2, -1, 2])
    x, weight, lora_a, lora_b, _ = inputs(generator, shape, 4, torch.bfloat16, device)
    upstream = draw(generator, 4, 20, 40, dtype=torch.bfloat16).to(device)
    spoiled = [factors.clone() for factors in (lora_a, lora_b)]
    for factors in spoiled:
        factors[[0, 1, 3]] = float("nan")
    clean = all_results(lowrank_linear, upstream, x, weight, lora_a, lora_b, index)
    results = all_results(lowrank_linear, upstream, x, weight, *spoiled, index)
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(results, clean, strict=True))
    assert all((gradient[[0, 1, 3]] == 0).all() for gradient in results[2:])
    base = all_results(lowrank_linear, upstream, x, weight, *spoiled, index_on(device, [-1] * 4))
    assert torch.equal(results[0][[0, 2]], base[0][[0, 2]])
    assert torch.equal(results[1][[0, 2]], base[1][[0, 2]])
    assert all((gradient == 0).all() for gradient in base[2:])


def test_nan_stays_in_its_row_of_the_output(generator: Generator, device: torch.device) -> None:
    """Also in the last row of a window and in that of a tile, which the rows past the edge wrap around to."""
    shape = (2, 150, 24, 40, 18)
    x, weight, lora_a, lora_b, _ = inputs(generator, shape, 2, torch.float16, device)
    rows = [0, 127, 128, 149]
    x[1, rows, 3] = float("nan")
    y = lowrank_linear(x, weight, lora_a, lora_b, SCALE)
    spoiled = y.isnan()
    assert spoiled[1, rows].all()
    assert spoiled.sum() == len(rows) * 40


@pytest.mark.parametrize("sizes", [(3, 0, 40, 24, 5), (0, 3, 40, 24, 5), (2, 3, 40, 24, 0)])
def test_empty_sizes(generator: Generator, device: torch.device, sizes: tuple[int, ...]) -> None:
    windows, tokens, d_in, d_out, rank = sizes
    shape = (windows, tokens, d_in, d_out, max(rank, 1))
    x, weight, lora_a, lora_b, _ = inputs(generator, shape, windows, torch.float32, device)
    lora_a, lora_b = lora_a[:, :rank], lora_b[:, :, :rank]
    upstream = draw(generator, windows, tokens, d_out, dtype=torch.float32).to(device)
    ours = all_results(lowrank_linear, upstream, x, weight, lora_a, lora_b)
    for mine, wanted in zip(ours, all_results(torch_linear_only, upstream, x, weight, lora_a, lora_b), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def torch_linear_only(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    return torch.nn.functional.linear(x, weight)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_gradients_of_some_inputs_only(generator: Generator, device: torch.device, needed: tuple[int, ...]) -> None:
    x, weight, lora_a, lora_b, _ = inputs(generator, (3, 20, 24, 40, 5), 2, torch.bfloat16, device)
    index = index_on(device, [1, -1, 0])
    upstream = draw(generator, 3, 20, 40, dtype=torch.bfloat16).to(device)
    everything = all_results(lowrank_linear, upstream, x, weight, lora_a, lora_b, index)[1:]
    leaves = [value.clone().requires_grad_(i in needed) for i, value in enumerate((x, lora_a, lora_b))]
    launched = launched_by(
        lambda: lowrank_linear(leaves[0], weight, *leaves[1:], SCALE, index).backward(upstream), run=True
    )
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in needed)
        assert leaf.grad is None or torch.equal(leaf.grad, everything[i])
    names = [name for name, _ in launched]
    assert names.count("shrink") == 1 + (0 in needed or 1 in needed)
    assert names.count("linear") == 1 + (0 in needed)
    assert names.count("factor_gradient") == (1 in needed) + (2 in needed)


def launched_by(function: Callable[[], Any], *, run: bool) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings of the kernels that a function launches."""
    launched = []

    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        launched.append((kernel.fn.__name__, options))
        if run:
            before(kernel, grid, arguments, options)

    before = launching.exchange_launcher(record)
    try:
        function()
    finally:
        launching.exchange_launcher(before)
    return launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_are_not_contiguous(generator: Generator, device: torch.device, dtype: torch.dtype) -> None:
    x, weight, lora_a, lora_b, bias = inputs(generator, (4, 20, 70, 24, 6), 4, dtype, device)
    upstream = draw(generator, 4, 20, 24, dtype=dtype).to(device)
    index = index_on(device, [3, -1, 0, 3])
    strided = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0)]
    strided += [value.mT.contiguous().mT for value in (weight, lora_a, lora_b)]
    strided_upstream = upstream.transpose(0, 1).contiguous().transpose(0, 1)
    rest = torch.stack([index, index], -1)[:, 0], torch.stack([bias, bias], -1)[:, 1]
    assert not any(value.is_contiguous() for value in (*strided, strided_upstream, *rest))
    exact = all_results(
        lambda x, w, a, b, s, c: plain_linear(x, w, a, b, s, index.tolist(), c),
        *(value.double() for value in (upstream, x, weight, lora_a, lora_b, bias)),
    )
    plain = all_results(reference.lowrank_linear, upstream, x, weight, lora_a, lora_b, index, bias)
    ours = all_results(lowrank_linear, strided_upstream, *strided, *rest)
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert mine.is_contiguous()
        assert_as_good_as(mine, theirs, true)
    expanded = upstream[:1, :1, :1].expand_as(upstream)  # the gradient of a sum
    leaf = x.clone().requires_grad_()
    (lowrank_linear(leaf, weight, lora_a, lora_b, SCALE, index).sum() * expanded[0, 0, 0]).backward()
    wanted = all_results(lowrank_linear, expanded.contiguous(), x, weight, lora_a, lora_b, index)[1]
    assert torch.equal(leaf.grad, wanted)


@pytest.mark.large
@pytest.mark.parametrize("spread", range(5))
def test_offsets_beyond_2_to_the_31(generator: Generator, device: torch.device, spread: int) -> None:
    """One tensor after the other has its rows so far apart; of its memory only those are touched."""
    *values, _ = inputs(generator, (1, 3, 16, 80, 3), 2, torch.float16, device)
    values += [draw(generator, 1, 3, 80, dtype=torch.float16).to(device)]
    index = index_on(device, [1])
    wanted = one_pass(*values, index)
    values[spread] = far_apart(values[spread])
    for mine, theirs in zip(one_pass(*values, index), wanted, strict=True):
        assert torch.equal(mine, theirs)


def one_pass(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, upstream: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    kernels = module("lowrank_linear", "triton")
    y, z = kernels.forward(x, weight, a, b, SCALE, index, None)
    return y, z, *kernels.backward(upstream, x, z, weight, a, b, SCALE, index, True)


def far_apart(value: Tensor) -> Tensor:
    """A copy whose last row along its first dimension with several, or the 64th, lies beyond 2^31 elements."""
    dimension = next(d for d, size in enumerate(value.shape) if size > 1)
    stride = list(value.stride())
    stride[dimension] = 2**31 // min(value.shape[dimension] - 1, 64) + 64  # a step of a loop is 64 rows
    elements = (value.shape[dimension] - 1) * stride[dimension] + value.numel()
    storage = torch.UntypedStorage(elements * value.element_size(), device=value.device)  # not filled
    return value.new_empty(0).set_(storage, 0, value.shape, stride).copy_(value)


def test_repetition_gives_the_same_bits(generator: Generator, device: torch.device) -> None:
    shape, index, adapters = (2, 70, 528, 32, 16), [1, 1], 2
    *values, bias = inputs(generator, shape, adapters, torch.bfloat16, device)
    upstream = draw(generator, *shape[:2], shape[3], dtype=torch.bfloat16).to(device)
    once, again = (all_results(lowrank_linear, upstream, *values, index_on(device, index), bias) for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(once, again, strict=True))


def test_windows_that_share_an_adapter_are_summed_in_float32(device: torch.device) -> None:
    """A bfloat16 sum would stall at 256: the ones that follow are half a unit in the last place."""
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16, device=device)
    x, index = one.repeat(9, 1, 1), torch.zeros(9, dtype=torch.int64, device=device)
    x[0] = 256
    grads = gradients(lambda a, b: lowrank_linear(x, one[0], a, b, 1.0, index), torch.ones_like(x), one, one)
    assert [gradient.item() for gradient in grads] == [264, 264]


@pytest.mark.parametrize("index", [None, [1, -1]])
def test_opcheck(generator: Generator, device: torch.device, index: list[int] | None) -> None:
    x, weight, lora_a, lora_b, bias = inputs(generator, (2, 3, 8, 6, 2), 2, torch.float32, device)
    variables = [value.requires_grad_() for value in (x, lora_a, lora_b)]
    arguments = (variables[0], weight, *variables[1:], SCALE, index_on(device, index), bias, "triton")
    torch.library.opcheck(torch.ops.gakernels.lowrank_linear.default, arguments)


def test_compile_without_graph_breaks(generator: Generator, device: torch.device) -> None:
    x, weight, lora_a, lora_b, bias = inputs(generator, (2, 20, 24, 40, 5), 2, torch.bfloat16, device)
    upstream = draw(generator, 2, 20, 40, dtype=torch.bfloat16).to(device)
    compiled = torch.compile(lowrank_linear, backend="aot_eager", fullgraph=True)
    ours = all_results(compiled, upstream, x, weight, lora_a, lora_b, None, bias)
    wanted = all_results(lowrank_linear, upstream, x, weight, lora_a, lora_b, None, bias)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, wanted, strict=True))


def test_autocast_computes_in_its_dtype(generator: Generator, device: torch.device) -> None:
    x, weight, lora_a, lora_b, _ = inputs(generator, (2, 20, 24, 40, 5), 2, torch.float32, device)
    upstream = draw(generator, 2, 20, 40, dtype=torch.bfloat16).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = all_results(lowrank_linear, upstream, x, weight, lora_a, lora_b)
    half = [value.bfloat16() for value in (x, weight, lora_a, lora_b)]
    wanted = all_results(lowrank_linear, upstream, *half)
    assert ours[0].dtype == torch.bfloat16
    assert all(torch.equal(mine, theirs.to(mine.dtype)) for mine, theirs in zip(ours, wanted, strict=True))


def test_checkpointing_repeats_the_same_bits(generator: Generator, device: torch.device) -> None:
    x, weight, lora_a, lora_b, _ = inputs(generator, (2, 20, 24, 40, 5), 2, torch.float16, device)
    upstream = draw(generator, 2, 20, 40, dtype=torch.float16).to(device)

    def checkpointed(*arguments: Any) -> Tensor:
        return checkpoint(lowrank_linear, *arguments, use_reentrant=False)

    ours = all_results(checkpointed, upstream, x, weight, lora_a, lora_b)
    wanted = all_results(lowrank_linear, upstream, x, weight, lora_a, lora_b)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_only_where_pytorch_permits_it(device: torch.device, precision: str) -> None:
    ones = torch.ones(1, 2, 2, device=device)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        launched = launched_by(lambda: lowrank_linear(ones, ones[0], ones, ones), run=False)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert {options["PRECISION"] for _, options in launched} == {precision}


def test_float64_is_left_to_the_other_implementations() -> None:
    ones = torch.ones(1, 2, 2, dtype=torch.float64)
    with pytest.raises(BackendError, match=r"the kernels compute in float32, but x is torch\.float64"):
        lowrank_linear(ones, ones[0], ones, ones)


@pytest.mark.gpu
def test_cuda_graph_capture(generator: Generator, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    x, weight, lora_a, lora_b, _ = inputs(generator, (3, 130, 256, 300, 20), 2, torch.bfloat16, device)
    index, upstream = index_on(device, [1, -1, 0]), torch.ones(3, 130, 300, dtype=torch.bfloat16, device=device)
    wanted = one_pass(x, weight, lora_a, lora_b, upstream, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one_pass(x, weight, lora_a, lora_b, upstream, index)
    index.fill_(0)
    graph.replay()
    assert not torch.equal(captured[0], wanted[0])
    index.copy_(torch.tensor([1, -1, 0]))
    graph.replay()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(captured, wanted, strict=True))
