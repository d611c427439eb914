"""The suites: the operations and the modules by provider, inference, and a training step.

`pytest benchmarks/ -k operations --benchmark-only` runs one of them.
"""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import inference, modules, operations
from benchmarks.cases import BenchmarkCase, Outcome
from benchmarks.conftest import report
from benchmarks.measure import Timing
from benchmarks.rows import ResultRow

SUITES = {
    "test_operations": operations.cases,
    "test_modules": modules.cases,
    "test_inference": inference.cases,
}
Measured = Callable[[BenchmarkCase, str], Outcome]


def test_operations(case: BenchmarkCase, provider: str, measured: Measured) -> None:
    measured(case, provider)


def test_modules(case: BenchmarkCase, provider: str, measured: Measured) -> None:
    measured(case, provider)


def test_inference(case: BenchmarkCase, provider: str, measured: Measured) -> None:
    measured(case, provider)


@pytest.mark.benchmark(group="train_step")
def test_training(step_provider: str, training_rows: dict[str, ResultRow], benchmark: Any) -> None:
    """All providers take turns in one run of train_step.py; the plugin gets p20, median and p80."""
    row = training_rows[step_provider]
    if row.p20_ms is None or row.p50_ms is None or row.p80_ms is None:
        pytest.fail(f"train_step, {step_provider}: {row.status}: {row.detail}", pytrace=False)
    benchmark.extra_info.update({name: value for name, value in row.to_dict().items() if value not in (None, "")})
    report(benchmark, Timing((row.p20_ms, row.p50_ms, row.p80_ms), row.cache))
