"""The process of a stage of the GPU suite: `python -m benchmarks.worker STAGE --out DIR`.

Most stages measure cases and write a row for each. A broken GPU context ends the process
with status RESTART, and the suite starts another, which skips what was already tried. `compile` compiles the
Triton kernels in all processes at once; `kernels_once` runs every kernel once, for compute-sanitizer.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import inference, modules, operations
from benchmarks.cases import NOTHING_HERE, BenchmarkCase, Session, run_case
from benchmarks.gpu_suite import RESTART, SIZES, SuiteRun
from benchmarks.kernel_resources import capability, compile_launches, launches, preset_runs, settings_of
from benchmarks.measure import Ceilings, Effort, measure_ceilings, synchronize
from benchmarks.operations import Operation, OperationSizes, operations_of, seeded, with_leaves
from benchmarks.providers import with_backend
from benchmarks.rows import BAD_STATUSES, OK, TIMED, Environment, ResultRow, RowWriter, environment, read_rows
from gakernels import ops
from gakernels.ops import dispatch, launching

BROKEN = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")
SECONDS = 0.4  # of samples per case
KERNELS = ("triton", "cuda", "eager", "base_gemm")
OTHERS = ("svd_lowrank", "baddbmm")

Make = Callable[..., Sequence[BenchmarkCase]]  # takes a preset, a device, a dtype and names of providers


def measure(stage: str, run: SuiteRun, since: int = 0) -> int:
    """Measure the cases of a stage.

    Args:
        since: number of rows in the file when the stage began; later rows were tried in this stage.

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
            if (*case.key, provider) in tried:
                continue
            row = run_case(case, provider, session).row
            _write(writer, row)
            status = max(status, int(row.status in BAD_STATUSES))
            if any(sign in row.detail for sign in BROKEN):
                return RESTART
    return status


def dtype_of(run: SuiteRun) -> torch.dtype:
    return torch.float32 if run.rehearsal else torch.bfloat16


def _made(
    make: Make, *presets: str, names: Sequence[str] | None = None, **options: str
) -> Callable[[SuiteRun], list[BenchmarkCase]]:
    """The cases at the sizes of some presets; in a rehearsal, at tiny sizes."""

    def cases(run: SuiteRun) -> list[BenchmarkCase]:
        chosen = ("tiny",) if run.rehearsal else presets
        return [case for name in chosen for case in make(name, run.device, dtype_of(run), names, **options)]

    return cases


STAGES: dict[str, Callable[[SuiteRun], list[BenchmarkCase]]] = {
    "operations": _made(operations.cases, *SIZES, names=KERNELS),
    "other_operations": _made(operations.cases, "mistral-7b", names=OTHERS),
    "many_states": _made(operations.many_states, "mistral-7b", names=KERNELS),
    "compiled": _made(operations.cases, "mistral-7b", names=["compiled"]),
    "modules": _made(modules.cases, "mistral-7b", names=["auto", "linear"]),
    "inference": _made(inference.cases, "mistral-7b", names=inference.FAST),
    "inference_reference": _made(inference.cases, "mistral-7b", names=["reference"]),
    "flash_attention": _made(inference.cases, "mistral-7b", names=inference.FAST, attention="flash_attention_2"),
    "step_parts": _made(modules.part_cases, "mistral-7b"),
}


def _ceilings(run: SuiteRun, writer: RowWriter, where: Environment) -> Ceilings:
    """The ceilings from the rows of this device and commit; if missing, they are measured and become rows."""
    same = [row for row in _rows(run) if row.kernel == "ceiling" and _is_here(row, where)]
    if not same:
        dtypes = sorted({dtype_of(run), torch.float32}, key=str)
        same = list(_ceiling_rows(measure_ceilings(run.device, dtypes, small=run.rehearsal), where))
        for row in same:
            _write(writer, row)
    rates = {row.dtype: row.metrics["flops_per_s"] for row in same if row.mode == "gemm"}
    return Ceilings(rates, next(row.metrics["bytes_per_s"] for row in same if row.mode == "copy"))


def _ceiling_rows(ceilings: Ceilings, where: Environment) -> Iterator[ResultRow]:
    for dtype, rate in ceilings.gemm_flops.items():
        yield ResultRow("ceiling", "torch", "gemm", "", dtype, OK, where, metrics={"flops_per_s": rate})
    copy = {"bytes_per_s": ceilings.copy_bandwidth}
    yield ResultRow("ceiling", "torch", "copy", "", "float32", OK, where, metrics=copy)


def _rows(run: SuiteRun) -> list[ResultRow]:
    return read_rows(run.rows) if run.rows.is_file() else []


def _is_here(row: ResultRow, where: Environment) -> bool:
    return (row.environment.commit, row.environment.device) == (where.commit, where.device)


def _tried(run: SuiteRun, where: Environment, since: int) -> set[tuple[str, ...]]:
    """The cases with a time from this commit and device, and those that this stage tried before it was restarted."""
    numbered = enumerate(_rows(run))
    same = [row for number, row in numbered if number >= since or (row.status in TIMED and _is_here(row, where))]
    return {(*row.case, row.provider) for row in same}


def _write(writer: RowWriter, row: ResultRow) -> None:
    """Write a row to the files and one line to the terminal."""
    writer.write(row)
    time = "" if row.p50_ms is None else f"{row.p50_ms:.4g} ms"
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in row.metrics.items())
    line = f"  {' '.join(row.case)} {row.provider}: {row.status} {time} {metrics} {row.detail}"
    print(line.rstrip(), flush=True)


# Kernels without times


def compile_kernels(run: SuiteRun) -> int:
    """Compile what the operations launch, into Triton's cache, where later processes find it.

    Returns:
        The exit status: 1 if a kernel can't be compiled, 2 if none can.
    """
    names = ["context_state"] if run.rehearsal else dispatch.OPERATIONS
    obstacles = [reason for name in names if (reason := dispatch.missing(name, "triton"))]
    if launching.interpreting():
        obstacles.append("TRITON_INTERPRET is set: the kernels would be interpreted")
    if obstacles:
        print(f"can't compile: {obstacles[0]}", file=sys.stderr)
        return 2
    started = time.monotonic()
    with settings_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        wanted = launches(preset_runs(("tiny",) if run.rehearsal else SIZES, names, torch.bfloat16))
    failed = compile_launches(wanted, os.cpu_count() or 1, capability())
    seconds = time.monotonic() - started
    print("\n".join([*failed, f"compiled {len(wanted) - len(failed)} of {len(wanted)} launches in {seconds:.1f} s"]))
    return 1 if failed else 0


def run_kernels_once(run: SuiteRun) -> int:
    """Run every kernel forward and backward, at sizes with tails; returns 1 if no kernel could run."""
    sizes = OperationSizes(chunks=2, tokens=70, hidden=136, state=256, rank=32, layers=((136, 200),))
    done = 0
    for dtype in (torch.bfloat16, torch.float32):
        for operation in operations_of(sizes, run.device, dtype):
            for backend in ("triton", "cuda"):
                obstacle = run_once(operation, backend)
                done += obstacle is None
                print(f"{operation.name} {operation.dtype} {backend}: {obstacle or 'done'}", flush=True)
    return 0 if done else 1


def run_once(operation: Operation, backend: str) -> str | None:
    """Run one forward and backward; returns why the backend can't, or None if it did."""
    arguments, leaves = with_leaves(operation, operation.draw(seeded(operation.device, 0)))
    obstacle = dispatch.why_not(operation.name, backend, *arguments)
    if obstacle is not None:
        return obstacle
    returned = with_backend(backend, getattr(ops, operation.name))(*arguments)
    outputs, gradients = operation.upstream(returned, torch.ones_like(operation.defined(returned)))
    torch.autograd.grad(outputs, leaves, gradients)
    synchronize(operation.device)
    return None


KERNEL_STAGES = {"compile": compile_kernels, "kernels_once": run_kernels_once}


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=(*STAGES, *KERNEL_STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--since", type=int, default=0)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(words)
    run = SuiteRun(options.out, options.rehearse)
    kernels = KERNEL_STAGES.get(options.stage)
    return kernels(run) if kernels else measure(options.stage, run, options.since)


if __name__ == "__main__":
    sys.exit(main())
