"""How everything here is measured: device events on a GPU, a wall clock on a CPU, and the ceilings of the machine.

Each repetition gets its own prepared input (rotated among several sets), and on a GPU the L2 cache is overwritten in
before it, so a repetition never reads what the previous one left in the cache. The warm-up is not part of the
samples.
"""

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

CACHE_FLUSHED = "L2 flushed, inputs rotated"
CACHE_ROTATED = "inputs rotated"


@dataclass(frozen=True)
class Timing:
    """Times of the repetitions of one call, in milliseconds, and how the cache was treated."""

    samples_ms: tuple[float, ...]
    cache: str

    def percentile(self, percent: float) -> float:
        """Linear interpolation between the samples, 0 <= percent <= 100."""
        return percentile(self.samples_ms, percent)

    @property
    def p20_ms(self) -> float:
        return self.percentile(20)

    @property
    def p50_ms(self) -> float:
        return self.percentile(50)

    @property
    def p80_ms(self) -> float:
        return self.percentile(80)


@dataclass(frozen=True)
class Effort:
    """How long to measure a call.

    Attributes:
        warmup: calls before the samples.
        seconds: stop after about this long, without the warm-up, once there are `least` samples.
        least: fewest samples.
        most: most samples.
    """

    warmup: int = 2
    seconds: float = 1.0
    least: int = 5
    most: int = 100


@dataclass(frozen=True)
class Hardware:
    """The capabilities of a kind of GPU, and the source of the numbers."""

    name: str
    memory_bytes: float
    bandwidth: float  # bytes/s
    bf16_flops: float  # FLOP/s
    source: str


HARDWARE = (
    Hardware("H200", 141e9, 4.3e12, 780e12, "copy bandwidth and bf16 GEMM rate measured"),
    Hardware("H100", 80e9, 3.35e12, 780e12, "data sheet; the GEMM rate is the H200's, which has the same compute die"),
)


@dataclass(frozen=True)
class Ceilings:
    """The rates of this machine, measured at the start of a run.

    Attributes:
        gemm_flops: FLOP/s of a large square matrix product, by dtype (`bfloat16`, `float32`, ...).
        copy_bandwidth: bytes/s of a large copy inside the device's memory, bytes read plus bytes written.
    """

    gemm_flops: dict[str, float]
    copy_bandwidth: float


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear interpolation between the sorted samples.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("a percentile needs at least one sample")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def time_call(
    run: Callable[[T], object], prepare: Callable[[int], T], device: torch.device, effort: Effort | None = None
) -> Timing:
    """Time `run(prepare(i))` for i = 0, 1, 2, ...; only `run` counts.

    `prepare` gives repetition i its input: one of several sets (rotation), or the result of a forward pass whose
    backward is to be timed.
    """
    effort = effort or Effort()
    for i in range(effort.warmup):
        run(prepare(i))
    synchronize(device)
    collecting = gc.isenabled()
    gc.disable()
    try:
        sample = _event_sampler(device) if device.type == "cuda" else _clock_sample
        samples = _sample(sample, run, prepare, effort, device)
    finally:
        if collecting:
            gc.enable()
    return Timing(tuple(samples), CACHE_FLUSHED if device.type == "cuda" else CACHE_ROTATED)


def _sample(
    sample: Callable[[Callable[[T], object], T], Callable[[], float]],
    run: Callable[[T], object],
    prepare: Callable[[int], T],
    effort: Effort,
    device: torch.device,
) -> list[float]:
    pending: list[Callable[[], float]] = []
    started = time.perf_counter()
    while len(pending) < effort.most:
        pending.append(sample(run, prepare(effort.warmup + len(pending))))
        if len(pending) % effort.least == 0:
            synchronize(device)  # else the host runs ahead of the device and past the time limit
        if len(pending) >= effort.least and time.perf_counter() - started > effort.seconds:
            break
    synchronize(device)
    return [read() for read in pending]


def _clock_sample(run: Callable[[T], object], argument: T) -> Callable[[], float]:
    started = time.perf_counter()
    run(argument)
    elapsed = (time.perf_counter() - started) * 1e3
    return lambda: elapsed


def _event_sampler(device: torch.device) -> Callable[[Callable[[T], object], T], Callable[[], float]]:
    """Events around the call. The cache flush before it keeps the device busy while the host queues the call."""
    size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
    flush = torch.empty(size // 4, dtype=torch.int32, device=device)

    def sample(run: Callable[[T], object], argument: T) -> Callable[[], float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        run(argument)
        end.record()
        return lambda: float(start.elapsed_time(end))

    return sample


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The peak bytes of tensors during a call, beyond those that existed before it.

    On a GPU from the caching allocator; on a CPU from the profiler's record of every allocation, which makes the call
    slower, so never time it there. Internal allocations of libraries are not seen.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    return _cpu_peak(call)


def _cpu_peak(call: Callable[[], object]) -> int:
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        result = call()
    del result
    events: list[Any] = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hide the line that the profiler writes to file descriptor 2 at its start and end; no setting turns it off."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def resident_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype], small: bool = False) -> Ceilings:
    """GEMM rate for each dtype and copy bandwidth, on random data; `small` is for tests."""
    effort = Effort(warmup=1, seconds=0.2, least=2) if small else Effort(warmup=3, seconds=0.7)
    gemm_flops = {dtype_name(dtype): _gemm_rate(device, dtype, small, effort) for dtype in dtypes}
    return Ceilings(gemm_flops, _copy_rate(device, small, effort))


def _gemm_rate(device: torch.device, dtype: torch.dtype, small: bool, effort: Effort) -> float:
    size = 128 if small else 1024 if device.type == "cpu" else 8192
    if device.type == "cuda" and dtype in (torch.float32, torch.float64):
        size = 4096
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = time_call(lambda _: left @ right, lambda i: i, device, effort)
    return 2.0 * size**3 / (timing.p50_ms * 1e-3)


def _copy_rate(device: torch.device, small: bool, effort: Effort) -> float:
    count = 2**16 if small else 2**26 if device.type == "cpu" else 2**30  # float32: 256 KB, 256 MB, 4 GB
    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    timing = time_call(lambda _: target.copy_(source), lambda i: i, device, effort)
    return 2.0 * source.nbytes / (timing.p50_ms * 1e-3)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or the host is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


# Time of the parts of a step: named regions in the code, and a clock that adds up their times


@dataclass
class PartClock:
    """Exclusive times of named regions: the time of an inner region does not count towards the outer one.

    On a GPU the boundaries are events in the stream, so that the host does not wait.
    """

    device: torch.device
    _marks: list[tuple[str, "float | torch.cuda.Event"]] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def enter(self, name: str) -> None:
        """Begin a region; the open one pauses."""
        self._open.append(name)
        self._mark()

    def leave(self) -> None:
        """End the innermost region; the enclosing one resumes."""
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        """From now on, time counts towards the innermost open region."""
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
    """Let regions report to this clock while the block runs."""
    _running.append(clock)
    try:
        yield clock
    finally:
        _running.pop()


@contextmanager
def paused() -> Iterator[None]:
    """Let regions report to no clock while the block runs: compiled code would be recompiled for a clock."""
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
