"""Work beside the current stream of a GPU: started behind what it needs, waited for where its result is used."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Streams(Protocol):
    """The current stream and one beside it."""

    def mark(self) -> Any:
        """A place in the current stream: everything that was queued there until now."""

    def beside(self, place: Any) -> AbstractContextManager[None]:
        """Inside the block the side stream is the current one; it waits for that place first."""

    def join(self) -> None:
        """Let the current stream wait for all that was queued beside it."""

    def lend(self, tensors: Iterable[Tensor], beside: bool) -> None:
        """Keep the memory of tensors of one stream, when they are freed, until the other (the one beside, or the
        current one) has passed its last use of them."""


class SideStream:
    """A second stream of one GPU. Autograd runs the backward of an operation on the stream of its forward, and itself
    makes a gradient's consumer wait for its producer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def beside(self, place: torch.cuda.Event) -> Iterator[None]:
        self.stream.wait_event(place)
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def lend(self, tensors: Iterable[Tensor], beside: bool) -> None:
        stream = self.stream if beside else torch.cuda.current_stream(self.device)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(stream)

    def __reduce__(self) -> Any:
        return SideStream, (self.device,)  # a copy has a stream of its own


class OneStream:
    """No second stream: a device that runs one thing after the other."""

    def mark(self) -> None:
        return None

    @contextmanager
    def beside(self, place: None) -> Iterator[None]:
        yield

    def join(self) -> None:
        return None

    def lend(self, tensors: Iterable[Tensor], beside: bool) -> None:
        return None


def streams_of(device: torch.device) -> Streams:
    """A second stream on a GPU, none elsewhere."""
    return SideStream(device) if device.type == "cuda" else OneStream()


class Later(Generic[T]):
    """A value that is formed beside the current stream when it is first asked for.

    The work waits for what the current stream had been given when this was made, not for what came after. It is queued
    only when its result is needed, behind the work of the current stream that it runs beside: a part of it that makes
    the host wait does not hold that up.

    Args:
        streams: where.
        inputs: tensors of the current stream that the work reads.
        form: makes the value, and lists the tensors in it that the current stream will read.
    """

    def __init__(self, streams: Streams, inputs: Iterable[Tensor], form: Callable[[], tuple[T, list[Tensor]]]) -> None:
        self._streams, self._form = streams, form
        self._place = streams.mark()
        self._value: list[T] = []
        streams.lend(inputs, beside=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def result(self) -> T:
        """The value; the current stream waits for it."""
        if not self._value:
            with self._streams.beside(self._place):
                value, tensors = self._form()
            self._streams.join()
            self._streams.lend(tensors, beside=False)
            self._value.append(value)
        return self._value[0]
