"""Time and memory of a block."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Measured:
    """The time of a block in seconds, and the peak memory in bytes while it ran."""

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured(device: torch.device) -> Iterator[Measured]:
    """Measure a block: on a GPU the memory that PyTorch allocates, elsewhere the resident memory of the process.

    If the peak can't be reset (it can on Linux), it is the peak of the process so far.
    """
    result = Measured()
    _synchronize(device)
    _start_peak(device)
    started = time.perf_counter()
    try:
        yield result
    finally:
        _synchronize(device)
        result.seconds = time.perf_counter() - started
        result.peak_bytes = _peak(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # if /proc can't be written
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM to VmRSS


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
