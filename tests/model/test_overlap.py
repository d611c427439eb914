"""The generators of a layer on a second stream: the order in which things are queued, and that nothing else changes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import make_model
from torch import Generator, Tensor

from gakernels import GenerativeAdapter
from gakernels.nn.side_stream import Later, OneStream, SideStream

CHUNKS, SEEN = 3, (0, 1, 2, 1, 2, 3)


class RecordingStreams:
    """Writes down what is done to a second stream."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.lent: list[tuple[Tensor, bool]] = []

    def mark(self) -> int:
        self.events.append("mark")
        return len(self.events)

    @contextmanager
    def beside(self, place: int) -> Iterator[None]:
        assert self.events[place - 1] == "mark"
        self.events.append("wait beside")
        yield
        self.events.append("done beside")

    def join(self) -> None:
        self.events.append("join")

    def lend(self, tensors: Iterable[Tensor], beside: bool) -> None:
        self.lent += [(tensor, beside) for tensor in tensors]


def windows(generator: Generator, rows: int = 2, tokens: int = 5) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 60, (rows, len(SEEN), tokens), generator=generator)
    return ids, torch.ones(ids.shape, dtype=torch.bool)


def losses_and_gradients(model: GenerativeAdapter, ids: Tensor, mask: Tensor) -> list[Tensor]:
    hidden, states = model(ids, mask, CHUNKS, SEEN)
    loss = hidden.square().mean() + sum(state.square().mean() for state in states.values())
    parameters = list(model.generators.parameters())
    return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]


def test_the_work_waits_for_its_place_and_is_waited_for() -> None:
    streams = RecordingStreams()
    given, made = torch.ones(2), torch.ones(3)

    def form() -> tuple[str, list[Tensor]]:
        streams.events.append("form")
        return "value", [made]

    later = Later(streams, [given], form)
    streams.events.append("attention")
    assert later.result() == later.result() == "value"
    assert streams.events == ["mark", "attention", "wait beside", "form", "done beside", "join"]
    assert [(tensor is given, tensor is made, beside) for tensor, beside in streams.lent] == [
        (True, False, True),
        (False, True, False),
    ]


@pytest.mark.parametrize(("linear", "before"), [("o_proj", ["mark", "attention"]), ("q_proj", ["mark", "wait beside"])])
def test_what_runs_before_the_generators_are_waited_for(
    generator: Generator, linear: str, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generators of a layer are queued behind its attention, unless the attention itself needs their adapter."""
    model = make_model("llama", linears=(linear,), layers=(1,))
    streams = RecordingStreams()
    model._streams = streams
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*arguments: object, **options: object) -> object:
        streams.events.append("attention")
        return attention(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    with torch.no_grad():
        model(*windows(generator), CHUNKS, SEEN)
    first = streams.events.index("mark")
    assert streams.events[first : first + 2] == before
    assert streams.events.count("join") == streams.events.count("mark") == 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_losses_and_gradients_stay(generator: Generator, family: str) -> None:
    model = make_model(family, torch.float64, torch.float64)
    batch = windows(generator)
    plain = losses_and_gradients(model, *batch)
    model.overlap_generators()
    for ours, wanted in zip(losses_and_gradients(model, *batch), plain, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)
    model.overlap_generators(False)
    for ours, wanted in zip(losses_and_gradients(model, *batch), plain, strict=True):
        assert torch.equal(ours, wanted)


def test_all_that_crosses_is_lent(generator: Generator) -> None:
    """The memory of the hidden states must outlive the work beside, and that of factors and states the work after."""
    model = make_model("llama")
    model._streams = streams = RecordingStreams()
    ids, mask = windows(generator)
    _, states = model(ids, mask, CHUNKS, SEEN)
    sites = len(model.adapted_names)
    hidden = [tensor for tensor, beside in streams.lent if beside and tensor.dim() == 3 and tensor.shape[-1] == 32]
    assert len(hidden) == 2 * sites  # the first window goes alone
    back = [tensor for tensor, beside in streams.lent if not beside]
    assert all(any(tensor is state for tensor in back) for state in states.values())
    assert sum(tensor.dim() == 3 and tensor.shape[1:] in ((4, 32), (32, 4)) for tensor in back) >= sites


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_second_stream_changes_no_bit(generator: Generator) -> None:
    """Against the same order of operations on one stream, while other work keeps memory and the GPU busy."""
    model = make_model("llama", torch.bfloat16).to("cuda")
    batch = [tensor.cuda() for tensor in windows(generator, rows=4, tokens=100)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # sums with atomics differ from run to run
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model._streams = OneStream()
            wanted = losses_and_gradients(model, *batch)
            model._streams = SideStream(torch.device("cuda"))
            for turn in range(20):
                torch.cuda._sleep(1_000_000 * (turn % 3))
                rubbish = [torch.full((size,), torch.nan, device="cuda") for size in (1 << 12, 1 << 16, 1 << 20)]
                del rubbish
                found = losses_and_gradients(model, *batch)
                assert all(torch.equal(ours, plain) for ours, plain in zip(found, wanted, strict=True))
    finally:
        torch.use_deterministic_algorithms(before)
