"""Timing, memory and ceilings."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.measure import (
    Effort,
    is_out_of_memory,
    measure_ceilings,
    peak_bytes,
    percentile,
    resident_bytes,
    time_call,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("percent", [0, 20, 50, 80, 100])
def test_percentile_is_numpys(count: int, percent: float, generator: torch.Generator) -> None:
    samples = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    assert percentile(samples, percent) == pytest.approx(np.percentile(samples, percent))


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


def test_only_the_call_is_timed() -> None:
    def prepare(i: int) -> int:
        time.sleep(0.02)
        return i

    timing = time_call(lambda _: time.sleep(0.002), prepare, CPU, Effort(warmup=0, seconds=0, least=3))
    assert min(timing.samples_ms) >= 2
    assert timing.p50_ms < 15


def test_warm_up_is_apart_and_inputs_rotate() -> None:
    seen: list[int] = []

    def run(i: int) -> None:
        seen.append(i)
        if i < 2:
            time.sleep(0.05)

    timing = time_call(run, lambda i: i, CPU, Effort(warmup=2, seconds=0, least=4, most=9))
    assert seen == [0, 1, 2, 3, 4, 5]
    assert timing.p80_ms < 25


def test_number_of_samples() -> None:
    many = time_call(lambda _: None, lambda i: i, CPU, Effort(seconds=10, least=2, most=7))
    assert len(many.samples_ms) == 7
    slow = time_call(lambda _: time.sleep(0.01), lambda i: i, CPU, Effort(warmup=0, seconds=0.03, least=1, most=1000))
    assert len(slow.samples_ms) <= 4


def test_peak_counts_what_lives_at_one_time(capfd: pytest.CaptureFixture[str]) -> None:
    size = 4 * 1000 * 1000

    def call() -> torch.Tensor:
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return b + 1  # b and the result

    assert size * 2 <= peak_bytes(call, CPU) < size * 2.1
    assert size <= peak_bytes(lambda: torch.zeros(1000, 1000), CPU) < size * 1.1
    assert capfd.readouterr().err == ""


def test_resident_bytes_counts_a_storage_once() -> None:
    x = torch.zeros(10, 10)
    assert resident_bytes([x, x[2:], x.mT, torch.zeros(5)]) == 400 + 20


def test_ceilings() -> None:
    ceilings = measure_ceilings(CPU, [torch.float32], small=True)
    assert ceilings.gemm_flops["float32"] > 1e8
    assert ceilings.copy_bandwidth > 1e7


def test_out_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(failure.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError(f"no such file {Path()}"))
