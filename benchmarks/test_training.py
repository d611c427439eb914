"""A training step by provider. All take turns in one run of train_step.py; the plugin gets p20, median and p80."""

from typing import Any

import pytest

from benchmarks.conftest import report
from benchmarks.measure import Timing
from benchmarks.rows import Row


@pytest.mark.benchmark(group="train_step")
def test_training(step_provider: str, training_rows: dict[str, Row], benchmark: Any) -> None:
    row = training_rows[step_provider]
    if row.p20_ms is None or row.p50_ms is None or row.p80_ms is None:
        pytest.fail(f"train_step, {step_provider}: {row.status}: {row.detail}", pytrace=False)
    benchmark.extra_info.update({name: value for name, value in row.to_dict().items() if value not in (None, "")})
    report(benchmark, Timing((row.p20_ms, row.p50_ms, row.p80_ms), row.cache))
