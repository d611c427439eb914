"""The process of a stage that measures cases: `python -m benchmarks.worker STAGE --out DIR` writes a row for each.

A broken GPU context takes the process down with it; it ends then with status RESTART, and the suite starts another,
which leaves out what was tried already.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import inference, modules, operations, plans, step_parts
from benchmarks.cases import Case, Session, run_case
from benchmarks.measure import Ceilings, Effort, measure_ceilings
from benchmarks.rows import BAD_STATUSES, OK, TIMED, Environment, Row, RowWriter, environment, read_rows
from benchmarks.stages import NOTHING_HERE, RESTART, Run

BROKEN = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")
SECONDS = 0.4  # of samples per case
KERNELS = ("triton", "cuda", "eager", "base_gemm")
OTHERS = ("svd_lowrank", "baddbmm")

Make = Callable[..., Sequence[Case]]  # from a preset, a device, a dtype and names of providers


def measure(stage: str, run: Run, since: int = 0) -> int:
    """Measure the cases of a stage.

    Args:
        since: number of rows in the file when the stage began; what stands behind them was tried in this stage.

    Returns:
        The exit status: 0, 1 if a case is wrong or failed, RESTART, or NOTHING_HERE.
    """
    if stage == "flash_attention" and importlib.util.find_spec("flash_attn") is None:
        print("flash-attn is not installed")
        return NOTHING_HERE
    where = environment(run.device)
    writer = RowWriter(run.rows)
    effort = Effort(warmup=2, seconds=0.001 if run.rehearsal else SECONDS, least=3)
    session = Session(run.device, where, _ceilings(run, writer, where), effort)
    tried = _tried(run, where, since)
    status = 0
    for case in STAGES[stage](run):
        for provider in case.providers:
            if (*case_key(case), provider) in tried:
                continue
            row = run_case(case, provider, session).row
            _write(writer, row)
            status = max(status, int(row.status in BAD_STATUSES))
            if any(sign in row.detail for sign in BROKEN):
                return RESTART
    return status


def dtype_of(run: Run) -> torch.dtype:
    return torch.float32 if run.rehearsal else torch.bfloat16


def _made(make: Make, *presets: str, names: Sequence[str] | None = None, **options: str) -> Callable[[Run], list[Case]]:
    """The cases at the sizes of some presets; in a rehearsal at tiny ones."""

    def cases(run: Run) -> list[Case]:
        chosen = ("tiny",) if run.rehearsal else presets
        return [case for name in chosen for case in make(name, run.device, dtype_of(run), names, **options)]

    return cases


STAGES: dict[str, Callable[[Run], list[Case]]] = {
    "operations": _made(operations.cases, *plans.SIZES, names=KERNELS),
    "other_operations": _made(operations.cases, "mistral-7b", names=OTHERS),
    "many_states": _made(operations.many_states, "mistral-7b", names=KERNELS),
    "compiled": _made(operations.cases, "mistral-7b", names=["compiled"]),
    "modules": _made(modules.cases, "mistral-7b", names=["auto", "linear"]),
    "inference": _made(inference.cases, "mistral-7b", names=inference.FAST),
    "inference_reference": _made(inference.cases, "mistral-7b", names=["reference"]),
    "flash_attention": _made(inference.cases, "mistral-7b", names=inference.FAST, attention="flash_attention_2"),
    "step_parts": _made(step_parts.cases, "mistral-7b"),
}


def _ceilings(run: Run, writer: RowWriter, where: Environment) -> Ceilings:
    """Those that the rows have for this device and commit; else they are measured, and become rows."""
    same = [row for row in _rows(run) if row.kernel == "ceiling" and _is_here(row, where)]
    if not same:
        dtypes = sorted({dtype_of(run), torch.float32}, key=str)
        same = list(_ceiling_rows(measure_ceilings(run.device, dtypes, small=run.rehearsal), where))
        for row in same:
            _write(writer, row)
    rates = {row.dtype: row.metrics["flops_per_s"] for row in same if row.mode == "gemm"}
    return Ceilings(rates, next(row.metrics["bytes_per_s"] for row in same if row.mode == "copy"))


def _ceiling_rows(ceilings: Ceilings, where: Environment) -> Iterator[Row]:
    for dtype, rate in ceilings.gemm_flops.items():
        yield Row("ceiling", "torch", "gemm", "", dtype, OK, where, metrics={"flops_per_s": rate})
    copy = {"bytes_per_s": ceilings.copy_bandwidth}
    yield Row("ceiling", "torch", "copy", "", "float32", OK, where, metrics=copy)


def case_key(case: Case) -> tuple[str, str, str, str]:
    return case.kernel, case.mode, case.shape, case.dtype


def _rows(run: Run) -> list[Row]:
    return read_rows(run.rows) if run.rows.is_file() else []


def _is_here(row: Row, where: Environment) -> bool:
    return (row.environment.commit, row.environment.device) == (where.commit, where.device)


def _tried(run: Run, where: Environment, since: int) -> set[tuple[str, ...]]:
    """What has a time from this commit and device, and whatever this stage has tried before it was started again."""
    numbered = enumerate(_rows(run))
    same = [row for number, row in numbered if number >= since or (row.status in TIMED and _is_here(row, where))]
    return {(*row.case, row.provider) for row in same}


def _write(writer: RowWriter, row: Row) -> None:
    """To the files, and one line to the terminal."""
    writer.write(row)
    time = "" if row.p50_ms is None else f"{row.p50_ms:.4g} ms"
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in row.metrics.items())
    line = f"  {' '.join(row.case)} {row.provider}: {row.status} {time} {metrics} {row.detail}"
    print(line.rstrip(), flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Entry of the process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--since", type=int, default=0)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(words)
    return measure(options.stage, Run(options.out, options.rehearse), options.since)


if __name__ == "__main__":
    sys.exit(main())
