"""torch.compile of every autograd Function of the library: values and gradients against float64."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import gakernels
from gakernels.nn.cpu_attention import causal_attention
from gakernels.nn.float8_linear import Float8Linear
from gakernels.nn.frozen_pair import frozen_pair
from gakernels.nn.frozen_rms_norm import rms_norm
from gakernels.nn.low_rank_factors import add_low_rank_term
from gakernels.nn.token_loss import token_loss

ROOT = Path(gakernels.__file__).parent


@dataclass
class Case:
    """A function of the library, the tensors that it is differentiated by, and what it computes, in float64."""

    function: Callable[..., Tensor]
    inputs: list[Tensor]
    exact: Callable[..., Tensor]
    is_one_graph: bool = True


def pair(generator: Generator) -> Case:
    first, second = torch.randn(12, 24, generator=generator), torch.randn(12, 24, generator=generator)
    exact: Callable[..., Tensor] = lambda x: torch.cat([x @ first.double().mT, x @ second.double().mT])  # noqa: E731
    return Case(lambda x: torch.cat(frozen_pair(x, first, second)), [torch.randn(5, 24, generator=generator)], exact)


def norm(generator: Generator) -> Case:
    return norm_with(0.5 + torch.rand(24, generator=generator), generator)


def norm_without_weight(generator: Generator) -> Case:
    return norm_with(None, generator)


def norm_with(weight: Tensor | None, generator: Generator) -> Case:
    x = torch.randn(2, 5, 24, generator=generator)
    factor = 1 if weight is None else weight.double()

    def exact(x: Tensor) -> Tensor:
        return factor * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    return Case(lambda x: rms_norm(x, weight, 1e-5), [x], exact)


def low_rank_term(generator: Generator) -> Case:
    y, x = torch.randn(4, 5, 12, generator=generator), torch.randn(4, 5, 24, generator=generator)
    a, b = torch.randn(2, 3, 24, generator=generator), torch.randn(2, 12, 3, generator=generator)
    index = torch.tensor([1, -1, 0, 1])

    def exact(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        terms = [0.5 * x[i] @ a[k].mT @ b[k].mT if k >= 0 else 0 * y[i] for i, k in enumerate(index)]
        return y + torch.stack(terms)

    return Case(lambda y, x, a, b: add_low_rank_term(y, x, a, b, 0.5, index), [y, x, a, b], exact)


def loss_in_blocks(generator: Generator) -> Case:
    hidden, head = torch.randn(9, 6, generator=generator), torch.randn(11, 6, generator=generator)
    targets = torch.randint(11, (9,), generator=generator)

    def exact(hidden: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ head.double().mT, targets, reduction="none")

    # Its forward differentiates, which Dynamo leaves to Python.
    return Case(lambda h: token_loss(h, targets, lambda h: h @ head.mT, 11), [hidden], exact, is_one_graph=False)


def float8(generator: Generator) -> Case:
    """Small integers, which no 8-bit rounding changes."""
    linear = nn.Linear(16, 32).requires_grad_(False)
    linear.weight.copy_(torch.randint(-4, 5, (32, 16), generator=generator))
    x = torch.randint(-4, 5, (2, 5, 16), generator=generator).float()
    return Case(Float8Linear(linear), [x], lambda x: x @ linear.weight.double().mT + linear.bias.double())


def causal(generator: Generator) -> Case:
    query, key, value = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2))

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
        return (0.3 * query @ key.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ value

    return Case(lambda q, k, v: causal_attention(q, k, v, 0.3), [query, key, value], exact)


CASES = {
    "nn.cpu_attention._CausalAttention": causal,
    "nn.frozen_pair._Pair": pair,
    "nn.frozen_rms_norm._NormFunction": norm,
    "nn.frozen_rms_norm._NormFunction, no weight": norm_without_weight,
    "nn.low_rank_factors._LowRankTerm": low_rank_term,
    "nn.token_loss._LossInBlocks": loss_in_blocks,
    "nn.float8_linear._Product": float8,
}


def functions_of_the_library() -> Iterator[str]:
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Function") for base in node.bases):
                yield f"{module}.{node.name}"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_none_is_left_out() -> None:
    assert {name.split(",")[0] for name in CASES} == set(functions_of_the_library())


@pytest.mark.parametrize("name", CASES)
def test_compiled_values_and_gradients(generator: Generator, name: str) -> None:
    case = CASES[name](generator)
    compiled = torch.compile(case.function, backend="aot_eager", fullgraph=case.is_one_graph)
    leaves = [tensor.clone().requires_grad_() for tensor in case.inputs]
    wide = [tensor.double().requires_grad_() for tensor in case.inputs]
    found, wanted = compiled(*leaves), case.exact(*wide)
    upstream = torch.randint(-3, 4, found.shape, generator=generator).float()
    pairs = zip(
        [found, *torch.autograd.grad(found, leaves, upstream)],
        [wanted, *torch.autograd.grad(wanted, wide, upstream.double())],
        strict=True,
    )
    for ours, true in pairs:
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-4)
