"""Rows to test with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import Session
from benchmarks.measure import Effort
from benchmarks.rows import OK, Environment, ResultRow

WHERE = Environment(
    device="Some CPU",
    kind="cpu",
    clocks="",
    threads=1,
    torch="2.13.0",
    triton="none",
    cuda="none",
    python="3.11.7",
    commit="0123456789ab",
    date="2026-01-01T00:00:00Z",
)


@pytest.fixture
def where() -> Environment:
    return WHERE


@pytest.fixture
def make_row() -> Callable[..., ResultRow]:
    """A row with a time unless the entries say otherwise."""

    def make(median: float | None = 2.0, **entries: Any) -> ResultRow:
        names = {"kernel": "context_state", "provider": "eager", "mode": "forward", "shape": "T=8", "dtype": "float32"}
        times = {"p20_ms": median * 0.95, "p50_ms": median, "p80_ms": median * 1.05} if median is not None else {}
        return ResultRow(**{**names, "status": OK, "environment": WHERE, **times, **entries})

    return make


@pytest.fixture
def session() -> Session:
    """The least effort, without ceilings."""
    return Session(torch.device("cpu"), WHERE, None, Effort(warmup=1, seconds=0, least=2, most=2))
