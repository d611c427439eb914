"""The operations, forward and backward, by provider (operations.py)."""

from collections.abc import Callable

from benchmarks import operations
from benchmarks.cases import Case, Outcome

CASES = operations.cases


def test_operations(case: Case, provider: str, measured: Callable[[Case, str], Outcome]) -> None:
    measured(case, provider)
