"""Compiled decoder layers: one graph each, shared, and the same losses and gradients."""

from collections.abc import Iterator

import pytest
import torch
from tiny import make_model
from torch import Generator, Tensor
from torch._dynamo.utils import counters

from gakernels import GenerativeAdapter, InputError
from gakernels.cost.memory import Recomputation, set_recomputation
from gakernels.model.attachment import decoder_layers
from gakernels.model.compilation import compile_layers, uncompile_layers

CHUNKS, SEEN = 3, (0, 1, 2, 1, 2, 3)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def losses_and_gradients(model: GenerativeAdapter, ids: Tensor) -> list[Tensor]:
    hidden, _ = model(ids, torch.ones_like(ids, dtype=torch.bool), CHUNKS, SEEN)
    loss = hidden.square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.generators.parameters()))]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    whole = torch.cat([tensor.flatten() for tensor in wanted]).norm()
    for ours, plain in zip(found, wanted, strict=True):
        assert (ours - plain).norm() <= tolerance * (plain.norm() + 1e-3 * whole)


@pytest.mark.parametrize("case", ["plain", "two linears", "recomputed", "overlapped"])
def test_a_layer_is_one_graph_with_the_same_results(generator: Generator, case: str) -> None:
    linears = ("q_proj", "down_proj") if case == "two linears" else ("o_proj",)
    model = make_model("llama", linears=linears)
    ids = torch.randint(3, 60, (2, len(SEEN), 5), generator=generator)
    wanted = losses_and_gradients(model, ids)
    if case == "recomputed":
        set_recomputation(model, Recomputation(gated=(0, 1, 2)))
    if case == "overlapped":
        model.overlap_generators()
    compile_layers(model.base, fullgraph=case != "overlapped", backend="aot_eager")
    for _ in range(2):
        assert_same(losses_and_gradients(model, ids), wanted, 1e-4)
    if case != "overlapped":  # without a graph, the first layer with one, and all others
        assert counters["stats"]["unique_graphs"] == 3


def test_a_layer_is_compiled_or_recomputed_as_a_whole_but_not_both() -> None:
    model = make_model("llama")
    set_recomputation(model, Recomputation(whole=(1,)))
    with pytest.raises(InputError, match="recomputed as a whole can't be compiled"):
        compile_layers(model.base, backend="aot_eager")
    set_recomputation(model, Recomputation())
    compile_layers(model.base, backend="aot_eager")
    with pytest.raises(InputError, match="whole must name decoder layers that are not compiled, but names 1"):
        set_recomputation(model, Recomputation(whole=(1,)))


def test_the_plain_forward_comes_back(generator: Generator) -> None:
    model = make_model("llama")
    ids = torch.randint(3, 60, (1, len(SEEN), 5), generator=generator)
    wanted = losses_and_gradients(model, ids)
    compile_layers(model.base, backend="aot_eager")
    uncompile_layers(model.base)
    for ours, plain in zip(losses_and_gradients(model, ids), wanted, strict=True):
        assert torch.equal(ours, plain)
    compile_layers(model.base, backend="aot_eager")
    base = model.detach()
    assert not any("forward" in vars(layer) for layer in decoder_layers(base)[1])


@pytest.mark.slow
def test_with_the_compiler_itself(generator: Generator) -> None:
    model = make_model("llama")
    ids = torch.randint(3, 60, (2, len(SEEN), 5), generator=generator)
    wanted = losses_and_gradients(model, ids)
    compile_layers(model.base, fullgraph=True)
    assert_same(losses_and_gradients(model, ids), wanted, 1e-3)
