"""The modules, forward and backward, by backend (modules.py)."""

from collections.abc import Callable

from benchmarks import modules
from benchmarks.cases import Case, Outcome

CASES = modules.cases


def test_modules(case: Case, provider: str, measured: Callable[[Case, str], Outcome]) -> None:
    measured(case, provider)
