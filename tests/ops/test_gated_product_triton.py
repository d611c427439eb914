"""The Triton kernels of gated_product against float64 and PyTorch; in Triton's interpreter where there is no GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import assert_as_good_as, draw, gradients
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from gakernels.ops import gated_product, launching
from gakernels.ops.dispatch import module, why_not
from gakernels.ops.gated_product import reference

pytest.importorskip("triton")
pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("triton_backend")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (7,), (3, 5, 11), (2, 1024), (2, 3, 1025)]


def inputs(generator: Generator, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """gate, up and an upstream gradient."""
    return [(3 * draw(generator, *shape)).to(device, dtype) for _ in range(3)]


def results(function: Callable[..., Tensor], gate: Tensor, up: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """The product and both gradients."""
    return function(gate, up), *gradients(function, upstream, gate, up)


def joined(function: Callable[..., Tensor], draws: list[list[Tensor]]) -> list[Tensor]:
    """The results of several draws, each behind the other."""
    return [
        torch.cat([one.flatten() for one in parts])
        for parts in zip(*(results(function, *d) for d in draws), strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradients(
    generator: Generator, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    values = inputs(generator, shape, dtype, device)
    for mine in results(gated_product, *values):
        assert (mine.dtype, mine.shape) == (dtype, shape)
        assert mine.is_contiguous()
    # Errors of a few numbers vary by chance, PyTorch's too: those of many draws are compared.
    draws = [values, *(inputs(generator, shape, dtype, device) for _ in range(200 // values[0].numel()))]
    mine, plain = (joined(function, draws) for function in (gated_product, reference.gated_product))
    exact = joined(reference.gated_product, [[value.double() for value in values] for values in draws])
    for ours, theirs, true in zip(mine, plain, exact, strict=True):
        assert_as_good_as(ours, theirs, true)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_but_a_few_numbers_have_the_bits_of_pytorch(
    generator: Generator, device: torch.device, dtype: torch.dtype
) -> None:
    values = inputs(generator, (64, 1024), dtype, device)
    plain = results(reference.gated_product, *values)
    for mine, theirs in zip(results(gated_product, *values), plain, strict=True):
        assert (mine != theirs).float().mean() < 2e-3
        # A rounded factor differs by a unit in the last place at most; then the product is rounded.
        torch.testing.assert_close(mine, theirs, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates_and_numbers_that_are_none(device: torch.device, dtype: torch.dtype) -> None:
    infinity, largest = float("inf"), torch.finfo(dtype).max
    gate = torch.tensor([largest, -largest, 0.0, -0.0, infinity, -infinity, float("nan"), 100, -100], device=device)
    values = gate.to(dtype), torch.full_like(gate, 0.5).to(dtype), torch.ones_like(gate).to(dtype)
    plain = results(reference.gated_product, *values)
    for mine, theirs in zip(results(gated_product, *values), plain, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_no_numbers(device: torch.device) -> None:
    gate, up = (torch.empty(0, 4, device=device, requires_grad=True) for _ in range(2))
    product = gated_product(gate, up)
    product.sum().backward()
    assert product.shape == gate.grad.shape == up.grad.shape == (0, 4)


def test_inputs_and_upstream_that_are_not_contiguous(generator: Generator, device: torch.device) -> None:
    gate, up, upstream = inputs(generator, (3, 40, 50), torch.bfloat16, device)
    wanted = results(gated_product, gate, up, upstream)
    whole = torch.cat([gate, up], -1)
    leaves = [whole[..., :50].requires_grad_(), up.mT.contiguous().mT.requires_grad_()]
    product = gated_product(*leaves)
    strided = upstream.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for mine, theirs in zip((product, *torch.autograd.grad(product, leaves, strided)), wanted, strict=True):
        assert torch.equal(mine, theirs)
    expanded = upstream[:1, :1, :1].expand_as(upstream)
    mine = gradients(gated_product, expanded, gate, up)
    for value, target in zip(mine, gradients(gated_product, expanded.contiguous(), gate, up), strict=True):
        assert torch.equal(value, target)


def test_opcheck(generator: Generator, device: torch.device) -> None:
    gate, up, upstream = inputs(generator, (3, 5), torch.float32, device)
    leaves = gate.mT.contiguous().mT.requires_grad_(), up.requires_grad_()
    torch.library.opcheck(torch.ops.gakernels.gated_product.default, (*leaves, "triton"))
    torch.library.opcheck(torch.ops.gakernels.gated_product_backward.default, (upstream, gate, up.detach(), "triton"))
    grad_gate, _ = torch.ops.gakernels.gated_product_backward(upstream, *leaves, "triton")
    with pytest.raises(RuntimeError, match="gated_product has no second derivative with this backend"):
        grad_gate.sum().backward()


def test_compile_checkpoint_and_autocast_give_the_same_bits(generator: Generator, device: torch.device) -> None:
    values = inputs(generator, (3, 70), torch.bfloat16, device)
    wanted = results(gated_product, *values)

    def autocast(gate: Tensor, up: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.float16):
            return gated_product(gate, up)

    torch._dynamo.reset()
    compiled = torch.compile(gated_product, fullgraph=True, backend="aot_eager")
    for run in (compiled, lambda *leaves: checkpoint(gated_product, *leaves, use_reentrant=False), autocast):
        for mine, theirs in zip(results(run, *values), wanted, strict=True):
            assert torch.equal(mine, theirs)


def test_one_kernel_in_each_direction(generator: Generator, device: torch.device) -> None:
    gate, up, upstream = inputs(generator, (3, 70), torch.bfloat16, device)
    names: list[str] = []

    def watch(kernel: Any, *rest: Any) -> None:
        names.append(kernel.fn.__name__)
        before(kernel, *rest)

    before = launching.exchange_launcher(watch)
    try:
        results(gated_product, gate, up, upstream)
    finally:
        launching.exchange_launcher(before)
    assert names == ["product", "product", "gradients"]  # the gradients have a forward of their own here


def test_what_the_kernels_do_not_support(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.ones(2, dtype=torch.float64)
    assert why_not("gated_product", "triton", wide, wide) == (
        "the kernels compute in float32, but gate is torch.float64"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "NVIDIA GPU" in str(why_not("gated_product", "triton", torch.ones(2), torch.ones(2)))


@pytest.mark.large
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_numbers_beyond_32_bit_offsets(generator: Generator, device: torch.device) -> None:
    kernels, count = module("gated_product", "triton"), 2**31 + 1000
    gate, up = (torch.zeros(count, dtype=torch.bfloat16, device=device) for _ in range(2))
    last = inputs(generator, (100,), torch.bfloat16, device)
    for whole, part in zip((gate, up), last, strict=False):
        whole[-100:] = part
    assert torch.equal(kernels.forward(gate, up)[-100:], kernels.forward(*last[:2]))
    grads = kernels.backward(up, gate, up)
    for mine, theirs in zip(grads, kernels.backward(last[1], last[0], last[1]), strict=True):
        assert torch.equal(mine[-100:], theirs)
