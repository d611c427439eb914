"""What only a GPU can show: CUDA graphs, Inductor, streams, tensors beyond 2^31 elements. Needs one; not run in CI."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import relative
from torch import Tensor

from gakernels import context_state, low_rank_polar, lowrank_linear
from gakernels.ops import dispatch, gated_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
GPU = torch.device("cuda")
BACKENDS = ("eager", "triton", "cuda")


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=GPU, dtype=torch.float32).to(dtype)


def calls() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Any, ...]]]:
    """By operation: a function of its differentiable inputs, those inputs, and all arguments of the operation."""
    hidden, a2, b1 = draw(1, 3, 70, 128), draw(64, 128) / 11, draw(128, 64) / 11
    states, sketch = draw(3, 256, 256, dtype=torch.float32), draw(256, 32, dtype=torch.float32)
    x, weight = draw(4, 70, 128), draw(96, 128) / 11
    lora_a, lora_b = draw(2, 32, 128) / 11, draw(2, 96, 32) / 6
    index = torch.tensor([-1, 0, 1, 1], device=GPU)

    def norm(s: Tensor) -> Tensor:
        u, v = low_rank_polar(s, sketch)
        return u @ v.mT

    return {
        "context_state": (lambda h, a, b: context_state(h, a, b), (hidden, a2, b1), (hidden, a2, b1, None, None)),
        "low_rank_polar": (norm, (states,), (states, sketch, 1, 1e-3)),
        "lowrank_linear": (
            lambda x, a, b: lowrank_linear(x, weight, a, b, 0.5, index),
            (x, lora_a, lora_b),
            (x, weight, lora_a, lora_b, 0.5, index, None),
        ),
        "gated_product": (gated_product, (x, x + 1), (x, x + 1)),
    }


@pytest.fixture(params=dispatch.OPERATIONS)
def operation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, operation: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend, in force; skipped where it can't run."""
    obstacle = dispatch.why_not(operation, request.param, *calls()[operation][2])
    if obstacle is not None:
        pytest.skip(obstacle)
    monkeypatch.setenv("GAKERNELS_BACKEND", request.param)
    return request.param


def both(function: Callable[..., Tensor], upstream: Tensor | None, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    output = function(*leaves)
    return output, *torch.autograd.grad(output, leaves, torch.ones_like(output) if upstream is None else upstream)


def test_a_cuda_graph_replays_with_new_numbers(operation: str, backend: str) -> None:
    if (operation, backend) == ("low_rank_polar", "eager"):
        pytest.skip("cuSOLVER's eigendecomposition can't be captured")
    function, inputs, _ = calls()[operation]
    leaves = tuple(value.clone().requires_grad_() for value in inputs)
    upstream = torch.randn_like(function(*leaves))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both(function, upstream, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(function, upstream, leaves)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for replayed, direct in zip(captured, both(function, upstream, leaves), strict=True):
        assert torch.equal(replayed, direct)


def test_inductor(operation: str, backend: str) -> None:
    torch._dynamo.reset()
    function, inputs, _ = calls()[operation]
    leaves = tuple(value.clone().requires_grad_() for value in inputs)
    compiled = torch.compile(function, fullgraph=True)
    for ours, plain in zip(both(compiled, None, leaves), both(function, None, leaves), strict=True):
        assert relative(ours, plain) <= 1e-2


def test_another_stream_and_repetition_give_the_same_bits(operation: str, backend: str) -> None:
    function, inputs, _ = calls()[operation]
    leaves = tuple(value.clone().requires_grad_() for value in inputs)
    here = both(function, None, leaves)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        there = both(function, None, leaves)
    stream.synchronize()
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other)


@pytest.mark.large
def test_a_linear_layer_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """33 windows x 16,384 tokens x 4,096: the last rows lie beyond what 32 bits can count."""
    monkeypatch.setenv("GAKERNELS_BACKEND", "triton")
    windows, tokens, width, outputs = 33, 16_384, 4_096, 16
    x = torch.zeros(windows, tokens, width, device=GPU, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-1] = draw(tokens, width)
    weight, lora_a, lora_b = draw(outputs, width) / 64, draw(windows, 16, width) / 64, draw(windows, outputs, 16) / 4
    y = lowrank_linear(x, weight, lora_a, lora_b)
    wanted = x[-1].double() @ (weight.double() + lora_b[-1].double() @ lora_a[-1].double()).mT
    assert relative(y[-1], wanted) <= 1e-2
    assert not y[:-1].any()


@pytest.mark.large
def test_states_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,100 chunks of states of 1,024 x 1,024."""
    monkeypatch.setenv("GAKERNELS_BACKEND", "triton")
    chunks, hidden_size, state_size = 2_100, 64, 1_024
    hidden, a2, b1 = draw(1, chunks, 1, hidden_size), draw(state_size, hidden_size), draw(hidden_size, state_size)
    states = context_state(hidden, a2, b1)
    assert states.numel() > 2**31
    values, keys = (hidden[0, :, 0] @ factor for factor in (a2.mT, b1))
    assert relative(states[0, -1], values.double().mT @ keys.double()) <= 1e-3
