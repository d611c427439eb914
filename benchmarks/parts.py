"""Time of the parts of a step: named regions in the code, and a clock that adds up what each took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class PartClock:
    """Exclusive times of named regions: the time of an inner region does not count for the outer one.

    On a GPU the boundaries are events in the stream, so that the host does not wait.
    """

    device: torch.device
    _marks: list[tuple[str, "float | torch.cuda.Event"]] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def enter(self, name: str) -> None:
        """A region begins; whatever is open pauses."""
        self._open.append(name)
        self._mark()

    def leave(self) -> None:
        """The innermost region ends; the one around it goes on."""
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        """From now on time belongs to the innermost open region."""
        now: float | torch.cuda.Event
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((self._open[-1] if self._open else "", now))

    def seconds(self) -> dict[str, float]:
        """The time of each region since the last call; on a GPU after a synchronisation."""
        totals: dict[str, float] = {}
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                totals[name] = totals.get(name, 0.0) + _between(start, end)
        self._marks.clear()
        return totals


def _between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    return float(start.elapsed_time(end)) * 1e-3


_running: list[PartClock] = []


@contextmanager
def running(clock: PartClock) -> Iterator[PartClock]:
    """Regions report to this clock while the block runs."""
    _running.append(clock)
    try:
        yield clock
    finally:
        _running.pop()


@contextmanager
def paused() -> Iterator[None]:
    """Regions report to no clock while the block runs: for compiled code, which would be compiled anew for a clock."""
    clocks = _running[:]
    _running.clear()
    try:
        yield
    finally:
        _running.extend(clocks)


@contextmanager
def part(name: str) -> Iterator[None]:
    """A region that a running clock counts under this name; without a clock it does nothing."""
    if not _running:
        yield
        return
    clock = _running[-1]
    clock.enter(name)
    try:
        yield
    finally:
        clock.leave()
