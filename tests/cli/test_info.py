"""`gakernels info`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from gakernels import __version__

OPERATIONS = ("context_state", "low_rank_polar", "lowrank_linear")


def rows(out: str) -> dict[str, list[str]]:
    """The table of operations: backend and reason by name."""
    split = [line.split(maxsplit=2) for line in out.splitlines()]
    return {parts[0]: parts[1:] for parts in split if parts and parts[0] in OPERATIONS}


def test_it_shows_versions_and_each_operation_with_its_reason(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GAKERNELS_BACKEND", raising=False)
    outcome = run("info")
    assert (outcome.code, outcome.err) == (0, "")
    for package, version in (
        ("gakernels", __version__),
        ("torch", torch.__version__),
        ("transformers", transformers.__version__),
    ):
        assert [package, version] in [line.split() for line in outcome.out.splitlines()]
    assert set(rows(outcome.out)) == set(OPERATIONS)
    for backend, reason in rows(outcome.out).values():
        assert backend == "eager"
        assert reason.startswith("default")
    assert "float32 products for a damping from 0.001 on" in outcome.out


def test_a_forced_backend_is_the_reason(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAKERNELS_BACKEND", "reference")
    outcome = run("info")
    assert outcome.code == 0
    assert {backend for backend, _ in rows(outcome.out).values()} == {"reference"}
    assert all(reason.startswith("forced by GAKERNELS_BACKEND") for _, reason in rows(outcome.out).values())


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", "GAKERNELS_BACKEND=cuda, but that can't run context_state here: "),
        ("fast", "GAKERNELS_BACKEND must be one of reference, eager, triton, cuda, but it is 'fast'"),
    ],
)
def test_a_backend_that_is_not_there_is_a_mistake(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, backend: str, message: str
) -> None:
    monkeypatch.setenv("GAKERNELS_BACKEND", backend)
    outcome = run("info")
    assert outcome.code == 2
    assert outcome.err.startswith(f"gakernels info: {message}")
    assert outcome.err.count("\n") == 1
