"""gated_product: silu(gate) * up with the bits of PyTorch, what it keeps, and the arguments that it refuses."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import draw, gradients
from torch import Generator, Tensor

from gakernels import InputError
from gakernels.ops import gated_product

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_have_the_bits_of_pytorch(generator: Generator, dtype: torch.dtype) -> None:
    gate, up, upstream = (draw(generator, 3, 5, 7, dtype=dtype) for _ in range(3))
    wanted = F.silu(gate) * up, *gradients(lambda g, u: F.silu(g) * u, upstream, gate, up)
    for mine, theirs in zip(
        (gated_product(gate, up), *gradients(gated_product, upstream, gate, up)), wanted, strict=True
    ):
        assert torch.equal(mine, theirs)


def test_gradcheck(generator: Generator) -> None:
    leaves = tuple(draw(generator, 3, 4).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(gated_product, leaves)


@pytest.mark.parametrize("needed", [0, 1])
def test_the_gradient_of_one_input_only(generator: Generator, needed: int) -> None:
    inputs = [draw(generator, 2, 5).requires_grad_(place == needed) for place in range(2)]
    upstream = draw(generator, 2, 5)
    gated_product(*inputs).backward(upstream)
    assert torch.equal(inputs[needed].grad, gradients(gated_product, upstream, *inputs)[needed])
    assert inputs[1 - needed].grad is None


def test_the_graph_keeps_gate_and_up_only(generator: Generator) -> None:
    gate, up = (draw(generator, 2, 5).requires_grad_() for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_product(gate, up)
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, u: (g.int(), u), "gate must be torch.float64 or torch.float32 or"),
        (lambda g, u: (g, u[:1]), r"up must have shape \(2, 5\), but it has \(1, 5\)"),
        (lambda g, u: (g, u.float()), "up must be torch.float64 like gate, but it is torch.float32"),
        (lambda g, u: (g, u.to("meta")), "up must be on cpu like gate, but is on meta"),
    ],
)
def test_arguments_that_do_not_fit(
    generator: Generator, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        gated_product(*change(draw(generator, 2, 5), draw(generator, 2, 5)))
