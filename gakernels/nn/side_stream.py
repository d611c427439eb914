"""Work on a second stream of a GPU: queued after its inputs, and waited for where its result is used."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Streams(Protocol):
    """The current stream and a side stream."""

    def mark(self) -> Any:
        """A point in the current stream, after everything that has been queued there so far."""

    def beside(self, place: Any) -> AbstractContextManager[None]:
        """Inside the block the side stream is the current one; it waits for that point first."""

    def join(self) -> None:
        """Make the current stream wait for everything queued on the side stream."""

    def lend(self, tensors: Iterable[Tensor], beside: bool) -> None:
        """Don't reuse the memory of freed tensors of one stream until the other stream (the side stream if `beside`, or
        the current one) has finished using them."""


class SideStream:
    """A second stream of one GPU. Autograd runs the backward of an operation on the stream of its forward, and itself
    makes the consumer of a gradient wait for its producer."""

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
    """A value that is computed on the side stream when it is first needed.

    The work waits for what was queued on the current stream when this object was made, not for what came later. It is
    queued only when its result is needed, after the work that it overlaps with, so a step that makes the host wait does
    not delay that work.

    Args:
        streams: the two streams.
        inputs: tensors of the current stream that the work reads.
        form: returns the value and the tensors in it that the current stream will read.
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
