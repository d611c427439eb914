"""A case is something to measure with one provider; `run_case` checks it, measures it and creates its row.

Correctness comes first: a case whose output or gradient is further from the float64 oracle than its tolerance is
reported as wrong and has no time.
"""

import functools
import gc
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Ceilings, Effort, Timing, is_out_of_memory, peak_bytes, time_call
from benchmarks.rows import FAILED, OK, OUT_OF_MEMORY, UNAVAILABLE, WRONG, Environment, ResultRow, rates, times

# Relative distance ||out - oracle|| / ||oracle|| that a correct implementation stays under: TF32 is near 3e-4.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-3, torch.bfloat16: 1e-2}
NOTHING_HERE = 4  # exit status of a command with nothing to measure on this machine


class UnavailableError(Exception):
    """A provider is not available here; the message says why."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a case and the least bytes that it moves: each input and output once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Trial:
    """A case prepared for one provider.

    Attributes:
        prepare: makes the input of repetition i.
        run: the timed call.
        error: largest relative distance to the oracle; None if something else is computed.
        metrics: computes further numbers from the timing.
        status: of a row with a time; FLOOR or OTHER if something else is computed.
        context: entered around the measurement, but not around the check.
    """

    prepare: Callable[[int], Any]
    run: Callable[[Any], object]
    error: Callable[[], float] | None
    metrics: Callable[[Timing], dict[str, float]] = lambda _: {}
    status: str = OK
    context: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class BenchmarkCase:
    """What is measured, and the providers that can compute it.

    Attributes:
        kernel, mode, shape, dtype: see `rows.ResultRow`.
        tolerance: of the relative distance to the oracle.
        work: None if it is not counted.
        providers: by name, functions that make a trial; they raise UnavailableError if the provider is not available.
    """

    kernel: str
    mode: str
    shape: str
    dtype: str
    tolerance: float
    work: Work | None
    providers: Mapping[str, Callable[[], Trial]] = field(repr=False)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The `case` of its rows."""
        return self.kernel, self.mode, self.shape, self.dtype

    def __str__(self) -> str:
        return " ".join(self.key)


@dataclass(frozen=True)
class Session:
    """Shared by the cases of one run."""

    device: torch.device
    environment: Environment
    ceilings: Ceilings | None
    effort: Effort


@dataclass(frozen=True)
class Outcome:
    """The row of a case and, if it was timed, the samples behind it."""

    row: ResultRow
    timing: Timing | None = None


def run_case(case: BenchmarkCase, provider: str, session: Session) -> Outcome:
    """Check and measure a case. Any error becomes the status of its row."""

    def row(status: str, **entries: Any) -> ResultRow:
        names = (case.kernel, provider, case.mode, case.shape, case.dtype)
        return ResultRow(*names, status=status, environment=session.environment, **entries)

    try:
        return _run(case, case.providers[provider](), session, row)
    except UnavailableError as error:
        return Outcome(row(UNAVAILABLE, detail=str(error)))
    except Exception as error:
        status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
        return Outcome(row(status, detail=f"{type(error).__name__}: {first_line(error)}"))
    finally:
        _release(session.device)


def _run(case: BenchmarkCase, trial: Trial, session: Session, row: Callable[..., ResultRow]) -> Outcome:
    error = trial.error() if trial.error else None
    if error is not None and not error <= case.tolerance:
        return Outcome(row(WRONG, error=error, detail=f"{error:.2g} from the oracle, {case.tolerance:g} allowed"))
    with trial.context():
        if session.device.type == "cuda":
            trial.run(trial.prepare(0))  # workspaces that libraries keep don't count as memory of the call
        peak = peak_bytes(functools.partial(trial.run, trial.prepare(0)), session.device)
        timing = time_call(trial.run, trial.prepare, session.device, session.effort)
    work: dict[str, Any] = {}
    if case.work and trial.status == OK:  # the others do different work
        shares = rates(timing, case.work.flops, case.work.bytes, case.dtype, session.ceilings)
        work = {"flops": case.work.flops, "bytes": case.work.bytes, **shares}
    measured = row(trial.status, error=error, peak_bytes=peak, metrics=trial.metrics(timing), **times(timing), **work)
    return Outcome(measured, timing)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def largest_error(values: Iterable[Tensor], targets: Iterable[Tensor]) -> float:
    """The largest ||value - target|| / ||target||; NaN, which exceeds every tolerance, if a value is not finite."""
    errors = [relative(value, target) for value, target in zip(values, targets, strict=True)]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def relative(value: Tensor, target: Tensor) -> float:
    """||value - target|| / ||target|| in float64; the norm of the value if the target is zero."""
    wide = target.double()
    size = wide.norm().item()
    distance = (value.double() - wide).norm().item()
    return distance / size if size else distance
