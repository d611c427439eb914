"""Contextualisation, decoding, and adapters for many users (inference.py)."""

from collections.abc import Callable

from benchmarks import inference
from benchmarks.cases import Case, Outcome

CASES = inference.cases


def test_inference(case: Case, provider: str, measured: Callable[[Case, str], Outcome]) -> None:
    measured(case, provider)
