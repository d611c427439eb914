"""The Triton kernels of context_state against the float64 definition; in Triton's interpreter where there is no GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import assert_as_good_as, draw, gradients
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from gakernels import context_state
from gakernels.ops import launching
from gakernels.ops.context_state import reference
from gakernels.ops.dispatch import module, why_not

pytest.importorskip("triton")
pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("triton_backend")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # B, T, M, d_h, d_r
    (4, 1, 1, 24, 17),
    (6, 2, 9, 40, 1),
    (2, 9, 5, 7, 20),
    (1, 2, 70, 33, 144),
    (2, 1, 130, 24, 70),
]


def inputs(
    generator: Generator, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, a2, b1, a mask that keeps about two thirds, initial_state."""
    batch, chunks, tokens, hidden_size, state_size = shape
    return (
        draw(generator, batch, chunks, tokens, hidden_size, dtype=dtype).to(device),
        (draw(generator, state_size, hidden_size) / hidden_size**0.5).to(device, dtype),
        (draw(generator, hidden_size, state_size) / hidden_size**0.5).to(device, dtype),
        (torch.rand(batch, chunks, tokens, generator=generator) < 2 / 3).to(device),
        draw(generator, batch, state_size, state_size, dtype=torch.float32).to(device),
    )


def upstream_of(generator: Generator, shape: tuple[int, ...], device: torch.device) -> Tensor:
    batch, chunks, _, _, state_size = shape
    return draw(generator, batch, chunks, state_size, state_size, dtype=torch.float32).to(device)


def with_mask(function: Callable[..., Tensor], mask: Tensor | None) -> Callable[..., Tensor]:
    return lambda hidden, a2, b1, *initial: function(hidden, a2, b1, mask, *initial)


def check(mask: Tensor | None, upstream: Tensor, *variables: Tensor) -> None:
    """States and every gradient are as good as those of the plain definition in the same dtype."""
    wide = [variable.double() for variable in variables]
    exact, plain, own = (with_mask(f, mask) for f in (reference.context_state, reference.context_state, context_state))
    states = own(*variables)
    assert states.dtype == torch.float32
    assert states.is_contiguous()
    assert_as_good_as(states, plain(*variables), exact(*wide))
    results = (
        gradients(own, upstream, *variables),
        gradients(plain, upstream, *variables),
        gradients(exact, upstream.double(), *wide),
    )
    for variable, mine, theirs, true in zip(variables, *results, strict=True):
        assert mine.dtype == variable.dtype
        assert_as_good_as(mine, theirs, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_states_and_gradients(
    generator: Generator, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, shape, dtype, device)
    mask[:, -1] = shape[1] == 1  # else a chunk of which nothing is left
    check(mask, upstream_of(generator, shape, device), hidden, a2, b1, initial)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_mask_and_initial_state(generator: Generator, device: torch.device, dtype: torch.dtype) -> None:
    shape = (1, 3, 65, 40, 64)
    hidden, a2, b1, _, _ = inputs(generator, shape, dtype, device)
    check(None, upstream_of(generator, shape, device), hidden, a2, b1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_of_low_rank(generator: Generator, device: torch.device, dtype: torch.dtype) -> None:
    """Two different tokens, many times: states of rank 2."""
    shape = (2, 2, 66, 16, 32)
    hidden, a2, b1, mask, _ = inputs(generator, shape, dtype, device)
    hidden = hidden[:, :1, :2].repeat(1, 2, 33, 1)
    check(mask, upstream_of(generator, shape, device), hidden, a2, b1)


@pytest.mark.parametrize("size", [1e-7, 1e5])
def test_float16_takes_gradients_beyond_its_range(generator: Generator, device: torch.device, size: float) -> None:
    """The suffix sums are kept in float16 with a scale: neither lost below 6e-8 nor infinite above 65504."""
    shape = (2, 3, 20, 24, 32)
    hidden, a2, b1, mask, _ = inputs(generator, shape, torch.float16, device)
    hidden = hidden * (100 if size < 1 else 0.01)
    check(mask, size * upstream_of(generator, shape, device), hidden, a2, b1)


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_left_out_may_hold_anything(
    generator: Generator, device: torch.device, dtype: torch.dtype, rubbish: float
) -> None:
    shape = (2, 3, 20, 18, 24)
    hidden, a2, b1, mask, _ = inputs(generator, shape, dtype, device)
    mask[0, 0] = mask[1, 1] = False
    upstream = upstream_of(generator, shape, device)

    def run(filling: float) -> tuple[Tensor, ...]:
        filled = hidden.masked_fill(~mask[..., None], filling)
        states = context_state(filled, a2, b1, mask)
        return states, *gradients(with_mask(context_state, mask), upstream, filled, a2, b1)

    results = run(rubbish)
    states, grad_hidden = results[:2]
    assert (states[0, 0] == 0).all()
    assert torch.equal(states[1, 1], states[1, 0])
    assert (grad_hidden[~mask] == 0).all()
    for mine, clean in zip(results, run(0.0), strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, clean)


def test_nan_elsewhere_is_seen_from_its_chunk_on(generator: Generator, device: torch.device) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, (2, 4, 6, 8, 16), torch.bfloat16, device)
    mask[0, 2, 3] = True
    hidden[0, 2, 3, 1] = float("nan")
    states = context_state(hidden, a2, b1, mask, initial)
    assert states[1].isfinite().all()
    assert states[0, :2].isfinite().all()
    assert states[0, 2:].isnan().all()


def test_tokens_left_out_have_no_gradient_whatever_comes_from_above(generator: Generator, device: torch.device) -> None:
    shape = (1, 2, 20, 12, 16)
    hidden, a2, b1, mask, _ = inputs(generator, shape, torch.bfloat16, device)
    upstream = torch.full_like(upstream_of(generator, shape, device), float("nan"))
    grad_hidden, _, _ = gradients(with_mask(context_state, mask), upstream, hidden, a2, b1)
    assert (grad_hidden[~mask] == 0).all()
    assert grad_hidden[mask].isnan().all()


@pytest.mark.parametrize(("shape", "kept"), [((2, 3, 0, 5, 16), True), ((2, 3, 4, 5, 16), False)])
def test_chunks_without_tokens(generator: Generator, device: torch.device, shape: tuple[int, ...], kept: bool) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, shape, torch.bfloat16, device)
    mask[:] = kept
    states = context_state(hidden, a2, b1, mask, initial)
    assert torch.equal(states, initial[:, None].expand_as(states))
    assert (context_state(hidden, a2, b1, mask) == 0).all()
    upstream = upstream_of(generator, shape, device)
    *parts, grad_initial = gradients(with_mask(context_state, mask), upstream, hidden, a2, b1, initial)
    assert parts[0].shape == hidden.shape
    assert all((part == 0).all() for part in parts)
    torch.testing.assert_close(grad_initial, upstream.sum(1))


def test_no_rows(generator: Generator, device: torch.device) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, (0, 3, 4, 5, 16), torch.bfloat16, device)
    assert context_state(hidden, a2, b1, mask, initial).shape == (0, 3, 16, 16)
    _, grad_a2, grad_b1 = gradients(with_mask(context_state, mask), hidden.new_zeros(0, 3, 16, 16), hidden, a2, b1)
    assert (grad_a2 == 0).all()
    assert (grad_b1 == 0).all()


def test_continuing_from_a_state_equals_one_go(generator: Generator, device: torch.device) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, (2, 5, 9, 12, 16), torch.bfloat16, device)
    whole = context_state(hidden, a2, b1, mask, initial)
    first = context_state(hidden[:, :2], a2, b1, mask[:, :2], initial)
    second = context_state(hidden[:, 2:], a2, b1, mask[:, 2:], first[:, -1])
    assert torch.equal(torch.cat([first, second], 1), whole)


def test_long_contexts_accumulate_in_float32(device: torch.device) -> None:
    """A bfloat16 sum would stall at 2^8 terms, a float16 one at 2^11."""
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    hidden = torch.ones(1, 6, 500, 1, dtype=torch.bfloat16, device=device)
    wanted = torch.arange(500.0, 3001.0, 500, device=device)
    assert torch.equal(context_state(hidden, one, one).flatten(), wanted)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with every stride changed."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def test_inputs_that_are_not_contiguous(generator: Generator, device: torch.device) -> None:
    shape = (2, 3, 10, 20, 40)
    values = inputs(generator, shape, torch.float32, device)
    upstream = upstream_of(generator, shape, device)

    def run(convert: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        hidden, a2, b1, mask, initial = (convert(value) for value in values)
        leaves = [leaf.requires_grad_() for leaf in (hidden, a2, b1, initial)]
        states = context_state(hidden, a2, b1, mask, initial)
        return states.detach(), *torch.autograd.grad(states, leaves, convert(upstream))

    plain = run(torch.clone)
    for mine, wanted in zip(run(strided), plain, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def test_upstream_gradients_with_any_strides_give_the_same_bits(generator: Generator, device: torch.device) -> None:
    shape = (2, 3, 10, 20, 40)
    hidden, a2, b1, mask, initial = inputs(generator, shape, torch.bfloat16, device)
    leaves = [leaf.requires_grad_() for leaf in (hidden, a2, b1, initial)]
    upstream = upstream_of(generator, shape, device)
    expanded = upstream[:, :1, :1].expand_as(upstream)
    states = context_state(hidden, a2, b1, mask, initial)
    for given in (strided(upstream), upstream.mT.contiguous().mT, expanded):
        mine = torch.autograd.grad(states, leaves, given, retain_graph=True)
        wanted = torch.autograd.grad(states, leaves, given.contiguous(), retain_graph=True)
        for value, target in zip(mine, wanted, strict=True):
            assert torch.equal(value, target)


@pytest.mark.large
def test_upstream_gradients_beyond_32_bit_offsets(generator: Generator, device: torch.device, tmp_path: Path) -> None:
    """The gradient of chunk 1 lies more than 2^31 numbers behind that of chunk 0, in a file of almost only holes."""
    hidden, a2, b1, mask, _ = inputs(generator, (1, 2, 4, 6, 16), torch.bfloat16, device)
    distance, numel = 2**31 + 64, 2**31 + 64 + 256
    if device.type == "cpu":
        (tmp_path / "holes").touch()
        storage = torch.from_file(str(tmp_path / "holes"), shared=True, size=numel, dtype=torch.float32)
    else:
        storage = torch.zeros(numel, device=device)
    upstream = storage.as_strided((1, 2, 16, 16), (0, distance, 16, 1))
    values = draw(generator, 1, 2, 16, 16, dtype=torch.float32).to(device)
    upstream.copy_(values)
    mine = gradients(with_mask(context_state, mask), upstream, hidden, a2, b1)
    for value, wanted in zip(mine, gradients(with_mask(context_state, mask), values, hidden, a2, b1), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 2), (1, 2)])
def test_gradients_of_some_inputs_only(generator: Generator, device: torch.device, needed: tuple[int, ...]) -> None:
    shape = (2, 2, 5, 12, 16)
    *values, mask, initial = inputs(generator, shape, torch.bfloat16, device)
    upstream = upstream_of(generator, shape, device)
    everything = gradients(with_mask(context_state, mask), upstream, *values, initial)
    leaves = [value.clone().requires_grad_(i in needed) for i, value in enumerate((*values, initial))]
    with_mask(context_state, mask)(*leaves).backward(upstream)
    for i, leaf in enumerate(leaves):
        if i in needed:
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, everything[i])
        else:
            assert leaf.grad is None


def test_repetition_gives_the_same_bits(generator: Generator, device: torch.device) -> None:
    shape = (1, 2, 66, 24, 70)
    hidden, a2, b1, mask, initial = inputs(generator, shape, torch.bfloat16, device)
    upstream = upstream_of(generator, shape, device)

    def run() -> tuple[Tensor, ...]:
        own = with_mask(context_state, mask)
        return own(hidden, a2, b1, initial), *gradients(own, upstream, hidden, a2, b1, initial)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(generator: Generator, device: torch.device, masked: bool) -> None:
    *variables, mask, initial = inputs(generator, (1, 2, 5, 6, 16), torch.float32, device)
    hidden, a2, b1 = (variable.requires_grad_() for variable in variables)
    rest = (mask, initial.requires_grad_()) if masked else (None, None)
    torch.library.opcheck(torch.ops.gakernels.context_state.default, (hidden, a2, b1, *rest, "triton"))
    states, projected = torch.ops.gakernels.context_state(hidden, a2, b1, *rest, "triton")
    arguments = (torch.ones_like(states), hidden, a2, b1, rest[0], projected, [True, masked, True], "triton")
    detached = tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)
    torch.library.opcheck(torch.ops.gakernels.context_state_backward.default, detached)
    grad_hidden, *_ = torch.ops.gakernels.context_state_backward(*arguments)
    with pytest.raises(RuntimeError, match="context_state has no second derivative with this backend"):
        grad_hidden.sum().backward()


def test_compile_checkpoint_and_autocast_give_the_same_bits(generator: Generator, device: torch.device) -> None:
    shape = (1, 2, 5, 12, 16)
    *variables, mask, initial = inputs(generator, shape, torch.float32, device)
    low = [variable.bfloat16() for variable in variables]
    upstream = upstream_of(generator, shape, device)
    plain = with_mask(context_state, mask)

    def checkpointed(*values: Tensor) -> Tensor:
        return checkpoint(plain, *values, use_reentrant=False)

    def autocast(*values: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return plain(*values)

    wanted = plain(*low, initial), *gradients(plain, upstream, *low, initial)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    for run, values in ((compiled, low), (checkpointed, low), (autocast, variables)):
        mine = run(*values, initial), *gradients(run, upstream, *values, initial)
        for value, target in zip(mine, wanted, strict=True):
            assert torch.equal(value.to(target.dtype), target)


@pytest.mark.parametrize(("setting", "expected"), [("ieee", "tf32x3"), ("tf32", "tf32")])
def test_tf32_only_where_pytorch_allows_it(device: torch.device, setting: str, expected: str) -> None:
    seen: list[dict[str, Any]] = []
    launcher = launching.exchange_launcher(lambda kernel, grid, arguments, options: seen.append(options))
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        hidden, weight = torch.ones(1, 1, 2, 4, device=device), torch.ones(4, 4, device=device)
        kernels = module("context_state", "triton")
        states, projected = kernels.forward(hidden, weight, weight, None, None)
        kernels.backward(states, hidden, weight, weight, None, projected, (True, True, True))
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
        launching.exchange_launcher(launcher)
    assert [options["PRECISION"] for options in seen if "PRECISION" in options] == [expected] * 3


def test_what_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(dtype: torch.dtype, state_size: int) -> str | None:
        tensors = torch.ones(1, 1, 2, 4, dtype=dtype), torch.ones(state_size, 4, dtype=dtype)
        return why_not("context_state", "triton", *tensors, torch.ones(4, state_size, dtype=dtype))

    assert "float64" in str(reason(torch.float64, 3))
    assert "no entries" in str(reason(torch.float32, 0))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "NVIDIA GPU" in str(reason(torch.float32, 3))


@pytest.mark.large
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_projections_than_32_bit_offsets_reach(generator: Generator, device: torch.device) -> None:
    """One chunk of 2^21 + 96 tokens with 2 d_r = 1024: the last rows lie behind 2^31 numbers."""
    tokens = 2**21 + 96
    hidden, a2, b1, _, _ = inputs(generator, (1, 1, 96, 16, 512), torch.bfloat16, device)
    long = torch.zeros(1, 1, tokens, 16, dtype=torch.bfloat16, device=device)
    long[:, :, -96:] = hidden
    assert torch.equal(context_state(long, a2, b1), context_state(hidden, a2, b1))
    upstream = upstream_of(generator, (1, 1, 96, 16, 512), device)
    mine, wanted = (gradients(context_state, upstream, h, a2, b1)[0][0, 0, -96:] for h in (long, hidden))
    torch.testing.assert_close(mine, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_capture_in_a_cuda_graph(generator: Generator, device: torch.device) -> None:
    shape = (1, 3, 100, 64, 128)
    *variables, mask, initial = inputs(generator, shape, torch.float16, device)
    leaves = [variable.requires_grad_() for variable in variables]
    upstream = upstream_of(generator, shape, device)

    def run() -> tuple[Tensor, ...]:
        states = context_state(*leaves, mask, initial)
        return states, *torch.autograd.grad(states, leaves, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    for value, wanted in zip(captured, run(), strict=True):
        assert torch.equal(value, wanted)
