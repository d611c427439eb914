"""Every benchmark runs at tiny sizes, counts its work rightly, and finds out wrong results."""

import argparse
import functools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import conftest, inference, modules, operations, providers, rows
from benchmarks.cases import BenchmarkCase, Session, Trial, largest_error, run_case
from benchmarks.operations import Operation
from benchmarks.rows import FAILED, FLOOR, OK, OUT_OF_MEMORY, ROOT, UNAVAILABLE, WRONG
from gakernels.ops.context_state import eager as state_eager
from gakernels.ops.low_rank_polar import eager as polar_eager
from gakernels.ops.lowrank_linear import eager as linear_eager

CPU = torch.device("cpu")


def operation(name: str) -> Operation:
    return next(op for op in operations.operations("tiny", CPU, torch.float32) if op.name == name)


def test_the_suites_run(tmp_path: Path) -> None:
    """`pytest benchmarks/ --benchmark-only` with the rows that it writes: every benchmark, checked and timed."""
    names = "auto,reference,eager,triton,svd_lowrank,linalg_svd,baddbmm,base_gemm,linear,full_prompt,base_chunks"
    names += ",merged,unmerged,compact,base"
    words = ["--preset", "tiny", "--providers", f"{names},frozen_base", "--seconds", "0.001", "--on", "cpu"]
    options = ["--benchmark-only", "-q", "-p", "no:cacheprovider", "--rows", str(tmp_path / "rows.jsonl")]
    # pytest-benchmark does not time anything inside a worker of pytest-xdist; this process is none.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**inherited, "OMP_NUM_THREADS": "1", "GAKERNELS_TEST_SEED": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    measured = rows.read_rows(tmp_path / "rows.jsonl")
    assert {row.status for row in measured} == {OK, FLOOR, "other", UNAVAILABLE}
    timed = Counter(row.kernel for row in measured if row.p50_ms is not None)
    assert timed == {
        "context_state": 4,
        "low_rank_polar": 8,
        "lowrank_linear": 8,
        "gated_product": 4,
        "AdapterGenerator": 4,
        "AdaptedLinear": 6,
        "contextualisation": 8,
        "decoding": 7,
        "adapter_generation": 4,
        "train_step": 3,
    }
    assert {row.detail for row in measured if row.provider == "triton"} <= {
        "kernels are timed on a GPU only",
        "No module named 'triton'",
    }
    assert all(row.error is not None and row.error < 1e-2 for row in measured if row.status == OK)
    assert all(row.gemm_share for row in measured if row.kernel == "context_state" and row.status == OK)


def metafunc(**options: str | None) -> Any:
    """A stand-in for pytest's, of the suite of operations."""
    given = {"--preset": "tiny", "--on": "cpu", "--providers": None, "--bench-dtype": None} | options
    config = SimpleNamespace(getoption=given.__getitem__)
    made: list[list[str]] = []
    parametrize = lambda names, values, ids: made.append(ids)  # noqa: E731
    return SimpleNamespace(
        config=config,
        module=SimpleNamespace(SUITES={"test_operations": operations.cases}),
        function=SimpleNamespace(__name__="test_operations"),
        fixturenames=["case", "provider"],
        parametrize=parametrize,
        made=made,
    )


def test_which_providers_run() -> None:
    for given, compiled in ((None, False), ("compiled,eager", True)):
        found = metafunc(**{"--providers": given})
        conftest.pytest_generate_tests(found)
        names = {name.rsplit("-", 1)[-1] for name in found.made[0]}
        assert ("compiled" in names) == compiled
        assert "eager" in names
        assert ("linalg_svd" in names) == (given is None)


def test_bad_options() -> None:
    with pytest.raises(pytest.UsageError, match=r"preset must be one of tiny, .*but it is 'huge'"):
        conftest.pytest_generate_tests(metafunc(**{"--preset": "huge"}))
    with pytest.raises(argparse.ArgumentTypeError, match="must be above 0"):
        conftest._positive("0")
    if not torch.cuda.is_available():
        with pytest.raises(pytest.UsageError, match="there is no GPU"):
            conftest.pytest_generate_tests(metafunc(**{"--on": "cuda"}))


# Work


def counted(call: Callable[[], object]) -> float:
    def in_place(total: Any, left: Any, right: Any, **_: Any) -> int:  # of shapes; the counter does not know it
        return 2 * left[0] * left[1] * left[2] * right[2]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        call()
    return counter.get_total_flops()


def forward_and_backward(name: str) -> tuple[Operation, float, float]:
    """The operations that the eager implementation does, forward and backward."""
    op = operation(name)
    arguments = op.draw(torch.Generator().manual_seed(0))
    call: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "context_state": (state_eager.forward, _state_backward),
        "low_rank_polar": (polar_eager.forward, _polar_backward),
        "lowrank_linear": (linear_eager.forward, _linear_backward),
    }
    forward, backward = call[name]
    results = forward(*arguments)
    return op, counted(lambda: forward(*arguments)), counted(lambda: backward(arguments, results))


def _state_backward(arguments: Any, results: Any) -> object:
    hidden, a2, b1, mask, _ = arguments
    return state_eager.backward(results[0], hidden, a2, b1, mask, results[1], (True, True, True))


def _polar_backward(arguments: Any, results: Any) -> object:
    states, sketch, _, damping = arguments
    return polar_eager.backward(results[0], results[1], states, sketch, results[2], damping)


def _linear_backward(arguments: Any, results: Any) -> object:
    x, weight, lora_a, lora_b, scale, index, _ = arguments
    return linear_eager.backward(results[0], x, results[1], weight, lora_a, lora_b, scale, index, True)


@pytest.mark.parametrize("name", ["context_state", "lowrank_linear"])
def test_the_counted_operations_are_those_that_are_done(name: str) -> None:
    op, forward, backward = forward_and_backward(name)
    assert op.forward_work.flops == forward
    assert op.backward_work.flops == backward


def test_the_operations_of_the_norm_are_done_but_for_small_ones() -> None:
    op, forward, backward = forward_and_backward("low_rank_polar")
    assert forward / 1.3 < op.forward_work.flops <= forward
    assert backward / 1.5 < op.backward_work.flops <= backward


@pytest.mark.parametrize("name", ["context_state", "low_rank_polar", "lowrank_linear", "gated_product"])
def test_the_counted_bytes_are_those_of_the_arguments_and_results(name: str) -> None:
    op = operation(name)
    arguments = op.draw(torch.Generator().manual_seed(0))
    results = providers.provider(name, "eager", CPU)(*arguments)
    tensors = [*arguments, *(results if isinstance(results, tuple) else (results,))]
    moved = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())
    assert op.forward_work.bytes == moved


# What goes wrong


def linear_case(implementation: Callable[..., Any], mode: str, monkeypatch: pytest.MonkeyPatch) -> BenchmarkCase:
    monkeypatch.setitem(providers.OTHERS, ("lowrank_linear", "baddbmm"), implementation)
    cases = operations.cases("tiny", CPU, torch.float32, ["baddbmm"])
    return next(case for case in cases if (case.kernel, case.mode) == ("lowrank_linear", mode))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 1.01 * grad


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["scaled", "nan", "gradient", "one window", "right"])
def test_a_wrong_result_has_no_time(kind: str, mode: str, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    right = providers.OTHERS["lowrank_linear", "baddbmm"]

    def implementation(*arguments: Any) -> torch.Tensor:
        y: torch.Tensor = right(*arguments)
        if kind == "scaled":
            return y * 1.01
        if kind == "nan":
            return torch.where(torch.arange(y.shape[-1]) == 3, torch.nan, y)
        if kind == "one window":
            return torch.cat([y[:1] * 1.1, y[1:]])
        return WrongGradient.apply(y) if kind == "gradient" else y

    outcome = run_case(linear_case(implementation, mode, monkeypatch), "baddbmm", session)
    if kind == "right" or (kind, mode) == ("gradient", "forward"):
        assert outcome.row.status == OK
        assert outcome.row.p50_ms is not None
    else:
        assert outcome.row.status == WRONG
        assert outcome.timing is None
        assert "from the oracle" in outcome.row.detail


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("CUDA out of memory. Tried"), OUT_OF_MEMORY), (ValueError("no\nsecond line"), FAILED)],
)
def test_one_case_fails_and_the_others_go_on(
    error: Exception, status: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def implementation(*_: Any) -> torch.Tensor:
        raise error

    case = linear_case(implementation, "forward", monkeypatch)
    row = run_case(case, "baddbmm", session).row
    assert (row.status, row.p50_ms) == (status, None)
    assert row.detail == f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert run_case(operations.cases("tiny", CPU, torch.float32, ["eager"])[0], "eager", session).row.status == OK


def test_a_floor_is_not_compared(session: Session) -> None:
    case = modules.cases("tiny", CPU, torch.float32, ["linear"])[2]
    row = run_case(case, "linear", session).row
    assert (row.status, row.error, row.flops) == (FLOOR, None, None)


def test_the_context_is_there_while_timing_but_not_in_the_check(session: Session) -> None:
    events: list[str] = []

    class Around:
        def __enter__(self) -> None:
            events.append("in")

        def __exit__(self, *_: object) -> None:
            events.append("out")

    trial = Trial(lambda i: i, lambda _: events.append("run"), lambda: float(bool(events)), context=Around)
    case = BenchmarkCase("k", "m", "s", "float32", 1e-3, None, {"p": lambda: trial})
    assert run_case(case, "p", session).row.status == OK
    assert (events[0], events[-1], set(events[1:-1])) == ("in", "out", {"run"})


def test_merged_weights_are_restored(session: Session) -> None:
    build = inference.Builder(inference.PRESETS["tiny"], CPU, torch.float32)
    before = {name: value.clone() for name, value in inference.model(build).base.state_dict().items()}
    case = next(c for c in inference.cases("tiny", CPU, torch.float32, ["merged"]) if c.kernel == "decoding")
    assert run_case(case, "merged", session).row.status == OK
    assert all(torch.equal(before[name], value) for name, value in inference.model(build).base.state_dict().items())


def test_nan_is_the_largest_error() -> None:
    one = torch.ones(3)
    assert largest_error([one, 2 * one], [one, one]) == 1
    assert not largest_error([one * torch.nan, one], [one, one]) <= 1e9
    assert not largest_error([one, one * torch.inf], [one, one]) <= 1e9
    assert largest_error([one], [torch.zeros(3)]) == pytest.approx(3**0.5)


def test_a_backend_is_forced_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "GAKERNELS_BACKEND"
    monkeypatch.setenv(variable, "eager")
    read = functools.partial(os.environ.get, variable)
    assert providers.with_backend("reference", read)() == "reference"
    assert providers.with_backend("auto", read)() is None
    assert os.environ[variable] == "eager"


@pytest.mark.parametrize("case", operations.many_states("tiny", CPU, torch.float32, ["eager", "svd_lowrank"]), ids=str)
def test_many_states(case: BenchmarkCase, session: Session) -> None:
    assert case.shape.startswith("T=96 ")
    assert [run_case(case, name, session).row.status for name in case.providers] == [OK, OK]


@pytest.mark.slow
@pytest.mark.parametrize("case", operations.cases("tiny", CPU, torch.float32, ["compiled"]), ids=str)
def test_compiled(case: BenchmarkCase, session: Session) -> None:
    row = run_case(case, "compiled", session).row
    assert row.status in (OK, UNAVAILABLE), row.detail
