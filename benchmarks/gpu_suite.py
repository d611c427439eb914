"""One command for a GPU machine: `python -m benchmarks.gpu_suite --plan check --out DIR`.

A plan is a list of stages, the most important first, each with a time limit and in its own process. Results are
written as they arrive, to DIR/rows.jsonl, DIR/log.txt and, for what has no rows, DIR/*.json: an interrupted run keeps
what was finished, and the same command resumes it. It ends with a short table, and with status 1 unless every stage
was done or had nothing to do. `--rehearse` runs a plan to its end on a CPU, at tiny sizes.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.cases import NOTHING_HERE
from benchmarks.measure import HARDWARE
from benchmarks.rows import BAD_STATUSES, ROOT, TIMED, UNAVAILABLE, ResultRow, commit, newest, read_rows
from gakernels.files import write_text

DONE, SKIPPED, FAILED, NO_TIME = "done", "skipped", "failed", "not run"
RESTART = 75  # exit status of a worker whose GPU context is broken: another one continues after that case
MOST_RESTARTS = 20
DEMO = ROOT / "gakernels" / "demo" / "assets" / "generator"
SIZES = ("mistral-7b", "smollm2-135m", "mistral-7b-1-chunk")  # of the operations
PATIENCE = 10  # factor of the limits in a rehearsal: a CPU may be slow
RATES = ("segment_tokens_per_s", "tokens_per_s", "users_per_s")


# How a stage is run: in its own process, for a limited time, with its output in `log.txt`


@dataclass(frozen=True)
class SuiteRun:
    """One run of a plan.

    Attributes:
        folder: of the results.
        rehearsal: on the CPU, at tiny sizes.
    """

    folder: Path
    rehearsal: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearsal else "cuda")

    @property
    def rows(self) -> Path:
        """The file of the rows."""
        return self.folder / "rows.jsonl"

    def row_count(self) -> int:
        return len(read_rows(self.rows)) if self.rows.is_file() else 0


@dataclass(frozen=True)
class StageResult:
    """How a stage ended, with a short remark."""

    status: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One part of a plan.

    Attributes:
        name, what: for the user.
        seconds: its time limit; what it has written by then is kept.
        command: makes, from the run and the seconds left for it, the command line or a StageResult that says at
            once why there is nothing to run.
        needs_gpu: whether a rehearsal leaves it out.
    """

    name: str
    what: str
    seconds: float
    command: Callable[[SuiteRun, float], list[str] | StageResult]
    needs_gpu: bool = False


def run_stage(stage: Stage, run: SuiteRun, seconds: float) -> StageResult:
    """Run a stage for at most `seconds` and at most its own limit."""
    if stage.needs_gpu and run.rehearsal:
        return StageResult(SKIPPED, "needs a GPU")
    if not run.rehearsal and not torch.cuda.is_available():
        return StageResult(FAILED, "there is no GPU that this torch can use; --rehearse runs the plan on the CPU")
    started = time.monotonic()
    deadline = started + min(seconds, stage.seconds)
    command = stage.command(run, deadline - started)
    if isinstance(command, StageResult):
        return command
    status: int | None = None
    for _ in range(MOST_RESTARTS):
        status = execute(command, run.folder / "log.txt", deadline - time.monotonic())
        if status != RESTART:
            break
    return replace(_result(status), seconds=time.monotonic() - started)


def _result(status: int | None) -> StageResult:
    if status is None:
        return StageResult(NO_TIME, "cut off: the time was over; what it had written is kept")
    if status == 0:
        return StageResult(DONE)
    if status == NOTHING_HERE:
        return StageResult(SKIPPED, "nothing of it can run here; see log.txt")
    if status == RESTART:
        return StageResult(FAILED, "the GPU context broke again and again")
    signalled = f"it was ended by signal {-status}" if status < 0 else f"exit status {status}"
    return StageResult(FAILED, f"{signalled}; see log.txt")


def execute(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Exit status of a command, or None if it ran out of time and was killed with its children.

    Its output is appended to the log and copied from there to the terminal.
    """
    if seconds <= 0:
        return None
    with log.open("ab") as file, log.open("rb") as shown:
        shown.seek(0, os.SEEK_END)
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < deadline:
                _show(shown.read())
                time.sleep(0.05)
        finally:
            ended = process.poll()
            with contextlib.suppress(ProcessLookupError):  # children may outlive the process
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _show(shown.read())
    return ended


def _show(text: bytes) -> None:
    if text:
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()


# What earlier runs have done


def run_stages(stages: Sequence[Stage], run: SuiteRun, seconds: float) -> dict[str, StageResult]:
    """Run the stages in order; whatever happens to one, the others run while there is time.

    Stages already done in this folder for this commit and device are left out.
    """
    identity = {"commit": commit(), "device": run.device.type}
    deadline = time.monotonic() + seconds
    results: dict[str, StageResult] = {}
    for stage in stages:
        heading = f"\n== {stage.name}: {stage.what}"
        print(heading, flush=True)
        before = read_results(run.folder).get(stage.name, {})
        if before.get("status") == DONE and identity.items() <= before.items():
            results[stage.name] = StageResult(DONE, "in an earlier run")
        elif time.monotonic() >= deadline:
            results[stage.name] = StageResult(NO_TIME, "the time was over before it began")
        else:
            with (run.folder / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"{heading}\n")
            results[stage.name] = run_stage(stage, run, deadline - time.monotonic())
            _write_result(run.folder, stage.name, results[stage.name], identity)
        print(f"{stage.name}: {results[stage.name].status} {results[stage.name].detail}".rstrip(), flush=True)
    return results


def read_results(folder: Path) -> dict[str, dict[str, object]]:
    """How the stages of earlier runs in the folder ended, with the commit and device that they were run for."""
    file = folder / "stages.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write_result(folder: Path, name: str, result: StageResult, identity: dict[str, str]) -> None:
    """Record how a stage ended."""
    results = read_results(folder) | {name: {**asdict(result), **identity}}
    write_text(folder / "stages.json", json.dumps(results, indent=2) + "\n")


# The plans: stages in order of importance, each with a time limit, and the total minutes


@dataclass(frozen=True)
class SuitePlan:
    """Stages that fit in so many minutes on one H100 or H200; those at the end may be cut off."""

    what: str
    minutes: float
    stages: tuple[Stage, ...]


def _python(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{module}", *words]


def _of_worker(stage: str, run: SuiteRun, *words: str) -> list[str]:
    return _python("worker", stage, "--out", str(run.folder), *(["--rehearse"] if run.rehearsal else []), *words)


# Correctness


def _build(_: SuiteRun, __: float) -> list[str] | StageResult:
    if importlib.util.find_spec("gakernels._cuda") is not None:
        return StageResult(DONE, "the CUDA extension was there")
    if shutil.which("nvcc") is None:
        return StageResult(FAILED, "nvcc is not there to build the CUDA sources")
    return ["env", "GAKERNELS_CUDA_BUILD=force", sys.executable, "setup.py", "build_ext", "--inplace"]


def _compile(run: SuiteRun, _: float) -> list[str] | StageResult:
    if importlib.util.find_spec("triton") is None:
        return StageResult(SKIPPED, "Triton is not installed")
    return ["env", "--unset=TRITON_INTERPRET", *_of_worker("compile", run)]


def _tests(run: SuiteRun, seconds: float) -> list[str]:
    few = ("tests/benchmarks/test_rows.py", "tests/ops/test_on_a_gpu.py", "--processes", "2", "-m", "")
    words = ("--seconds", f"{max(seconds - 10, 1):.0f}", *(few if run.rehearsal else ()))
    return [sys.executable, str(ROOT / "tests" / "sharding.py"), *words]


def _sanitizer(tool: str) -> Stage:
    def command(run: SuiteRun, _: float) -> list[str] | StageResult:
        if shutil.which("compute-sanitizer") is None:
            return StageResult(SKIPPED, "compute-sanitizer is not installed")
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *_of_worker("kernels_once", run)]

    return Stage(tool, f"every kernel once under compute-sanitizer's {tool}", 120, command, needs_gpu=True)


# Times


def _worker(name: str, what: str, seconds: float, needs_gpu: bool = False) -> Stage:
    """A stage of `benchmarks.worker`."""

    def command(run: SuiteRun, _: float) -> list[str]:
        return _of_worker(name, run, "--since", str(run.row_count()))

    return Stage(name, what, seconds, command, needs_gpu)


def _step(
    name: str,
    preset: str,
    providers: str,
    what: str,
    seconds: float,
    quantization: str | None = None,
    needs_gpu: bool = False,
) -> Stage:
    """Training steps: the providers of a stage in one process, with rows when they finish or the time is up."""

    def command(run: SuiteRun, left: float) -> list[str]:
        words = ["--preset", "tiny" if run.rehearsal else preset, "--providers", providers]
        words += ["--quantization", quantization] if quantization else []
        words += ["--steps", "2"] if run.rehearsal else []
        words += ["--device", run.device.type, "--rows", str(run.rows), "--seconds", f"{max(left - 20, 1):.0f}"]
        # Whether a step fits must not depend on how the allocator happens to split its blocks.
        return ["env", "PYTORCH_ALLOC_CONF=expandable_segments:True", *_python("train_step", *words)]

    return Stage(name, what, seconds, command, needs_gpu)


def _profile(preset: str, seconds: float) -> Stage:
    def command(run: SuiteRun, _: float) -> list[str]:
        words = ["--preset", "tiny" if run.rehearsal else preset, "--device", run.device.type]
        return _python("step_profile", *words, "--json", str(run.folder / "profile.json"))

    return Stage(f"profile_{preset}", f"a step of {preset}: kernels, launches, waits", seconds, command)


def _tune(preset: str, seconds: float) -> Stage:
    def command(run: SuiteRun, left: float) -> list[str] | StageResult:
        if importlib.util.find_spec("triton") is None:
            return StageResult(SKIPPED, "Triton is not installed")
        words = ["--preset", "tiny" if run.rehearsal else preset, "--device", run.device.type]
        words += ["--store", str(run.folder / "tuned.json")]
        words += ["--seconds", "0" if run.rehearsal else f"{max(left - 15, 1):.0f}"]
        return ["env", "--unset=TRITON_INTERPRET", *_python("tune", *words)]

    return Stage(f"tune_{preset}", f"launch settings at the sizes of {preset}", seconds, command)


def _demo(run: SuiteRun, _: float) -> list[str] | StageResult:
    if not DEMO.is_dir():
        return StageResult(SKIPPED, "the demo model is not part of this installation")
    words = ["demo", "--device", run.device.type, "--json", str(run.folder / "demo.json")]
    return [sys.executable, "-m", "gakernels", *words]


PLANS = {
    "check": SuitePlan(
        "correctness: the kernels' tests",
        2,
        (
            Stage("build", "the CUDA sources", 60, _build, needs_gpu=True),
            Stage("tests", "all that are marked `gpu` or `kernels`, in many processes", 110, _tests),
        ),
    ),
    "operations": SuitePlan(
        "the three operations and the modules, forward and backward, by provider",
        4,
        (
            Stage("compile", "their Triton kernels, in all processes at once", 45, _compile),
            _worker("operations", "kernels and plain PyTorch, several sizes", 130),
            _worker("modules", "the modules", 40),
            _worker("other_operations", "what others would use in their place", 50),
            _worker("many_states", "low_rank_polar for the states of 32 segments or users", 40),
            _worker("compiled", "the operations under torch.compile", 60, needs_gpu=True),
        ),
    ),
    "step": SuitePlan(
        "training steps",
        5,
        (
            _step("step_smollm2-135m", "smollm2-135m", "trainer,dense_lora,frozen_base", "SmolLM2-135M, floors", 90),
            _profile("smollm2-135m", 40),
            _step("step_mistral-7b", "mistral-7b", "trainer", "Mistral-7B by the trainer", 60),
            _step("step_fp8", "mistral-7b", "trainer", "the same on a base in FP8", 60, "fp8"),
            _profile("mistral-7b", 50),
            *(
                _step(f"step_mistral-7b_{name}", "mistral-7b", name, f"Mistral-7B: {name}", 60)
                for name in ("dense_lora", "frozen_base", "reference", "auto")
            ),
            _worker("step_parts", "loss, norm, activation and rotation against those of others", 40),
            *(
                _step(f"step_{name}", "mistral-7b", name, f"Mistral-7B: {name}", 60, needs_gpu="compiled" in name)
                for name in ("overlap", "recompute", "compiled_layers", "overlap_compiled")
            ),
        ),
    ),
    "inference": SuitePlan(
        "contexts of 1K to 128K tokens against the base model's prefill, decoding, many users",
        4,
        (
            _worker("inference", "all but the plain definitions", 150),
            _worker("inference_reference", "the plain definitions", 60),
            _worker("flash_attention", "contexts with flash-attn", 40, needs_gpu=True),
            Stage("demo", "the demo model's experiment", 90, _demo, needs_gpu=True),
        ),
    ),
    "tune": SuitePlan(
        "launch settings of the kernels, into DIR/tuned.json",
        5,
        (
            _tune("mistral-7b", 200),
            _tune("smollm2-135m", 100),
        ),
    ),
    "sanitize": SuitePlan(
        "memory errors, races and barriers of the kernels",
        5,
        tuple(_sanitizer(tool) for tool in ("memcheck", "racecheck", "synccheck")),
    ),
}


# The command


def main(words: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(words)
    plan = PLANS[options.plan]
    try:
        stages, minutes = choose(plan.stages, options.only), plan.minutes
        if options.rehearse:
            stages, minutes = [replace(s, seconds=PATIENCE * s.seconds) for s in stages], PATIENCE * minutes
        run = SuiteRun(options.out.resolve(), options.rehearse)
        run.folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 2
    where = "rehearsed on the CPU" if run.rehearsal else f"{minutes:g} minutes"
    print(f"plan {options.plan} ({plan.what}), {where}, commit {commit()}")
    print(f"stages: {', '.join(stage.name for stage in stages)}", flush=True)
    results = run_stages(stages, run, minutes * 60)
    print("\n" + summary(run, results))
    return int(any(result.status not in (DONE, SKIPPED) for result in results.values()))


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:11} {plan.minutes:g} minutes: {plan.what}" for name, plan in PLANS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        epilog="plans:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", required=True, choices=PLANS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default="", help="comma-separated stages of the plan (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    return parser


def choose(stages: Sequence[Stage], only: str) -> list[Stage]:
    """The stages to run, in their order. Raises: ValueError: the plan has no stage of a name."""
    wanted = [name for name in only.split(",") if name]
    unknown = [name for name in wanted if name not in {stage.name for stage in stages}]
    if unknown:
        names = ", ".join(stage.name for stage in stages)
        raise ValueError(f"--only must name stages of the plan ({names}), but has {', '.join(unknown)}")
    return [stage for stage in stages if not wanted or stage.name in wanted]


def summary(run: SuiteRun, results: dict[str, StageResult]) -> str:
    """The short table at the end: stages, then the newest row of each case and provider."""
    lines = [f"{'stage':26} {'status':8} {'s':>6}"]
    lines += [f"{name:26} {r.status:8} {r.seconds:6.1f} {r.detail}".rstrip() for name, r in results.items()]
    if not run.rows.is_file():
        return "\n".join([*lines, "", "nothing was measured"])
    rows = [row for row in newest(read_rows(run.rows)) if row.kernel != "ceiling"]
    return "\n".join([*lines, "", *table(rows), *shares(rows), "", f"rows: {run.rows}"])


def table(rows: Iterable[ResultRow]) -> list[str]:
    """One line for each case that has a time or failed, with the floors of an H200 and an H100 next to it.

    A training step that could not run also says why.
    """
    floors = " ".join(f"{hardware.name:>8}" for hardware in HARDWARE)
    lines = [f"{'case':58} {'provider':12} {'p50 ms':>9} {'gemm':>5} {'copy':>5} {floors} {'a second':>9}"]
    for row in rows:
        if row.status == UNAVAILABLE and row.kernel != "train_step":
            continue
        case = f"{row.kernel} {row.mode} {row.shape} {row.dtype}"
        time = f"{row.p50_ms:9.4g}" if row.status in TIMED and row.p50_ms is not None else f"{row.status:>9.9}"
        parts = " ".join(f"{share:5.0%}" if share else " " * 5 for share in (row.gemm_share, row.copy_share))
        lowest = " ".join(f"{value:8.3g}" if value else " " * 8 for value in floor_ms(row))
        rate = next((f"{row.metrics[name]:9.0f}" for name in RATES if name in row.metrics), "")
        note = f" {row.detail}" if row.status in (*BAD_STATUSES, UNAVAILABLE) else ""
        lines.append(f"{case:58.58} {row.provider:12.12} {time} {parts} {lowest} {rate}{note}".rstrip())
    return lines


def floor_ms(row: ResultRow) -> list[float | None]:
    """The least milliseconds for the counted operations and bytes on each kind of GPU: bf16 rate, 16-bit only."""
    if row.flops is None or row.bytes is None:
        return [None for _ in HARDWARE]
    flops = row.flops if row.dtype in ("bfloat16", "float16") else 0.0
    return [max(flops / h.bf16_flops, row.bytes / h.bandwidth) * 1e3 for h in HARDWARE]


def shares(rows: Sequence[ResultRow]) -> list[str]:
    """How fast contexts are read, as a share of the base model's own prefill of the same chunks."""
    base = {row.case: row.p50_ms for row in rows if row.provider == "base_chunks"}
    lines = []
    for row in rows:
        if (row.kernel, row.provider) == ("contextualisation", "auto") and row.p50_ms and base.get(row.case):
            lines.append(f"{row.shape.split()[0]}: {base[row.case] / row.p50_ms:.2f} of the base model's rate")  # type: ignore[operator]
    return ["", *lines] if lines else []


if __name__ == "__main__":
    raise SystemExit(main())
