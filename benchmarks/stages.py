"""The stages of the GPU suite: what each needs, how it is run in a process of its own, and how it ended."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

import torch

from benchmarks import worker
from benchmarks.measure import dtype_name
from benchmarks.rows import ROOT
from benchmarks.worker import Settings

DONE, SKIPPED, FAILED, NO_TIME = "done", "skipped", "failed", "not run"
MOST_RESTARTS = 20
DEMO = ROOT / "gakernels" / "demo" / "assets" / "generator"


@dataclass(frozen=True)
class Result:
    """How a stage ended, and a word about it."""

    status: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One part of the suite.

    Attributes:
        name, what: for the user.
        minutes: planned on an H200.
        by_default: whether it runs unless asked for.
        command: the command line, or a Result that says at once why there is nothing to run.
        needs_gpu: whether it can't run with `--device cpu`.
        no_tests: exit status 5 of pytest, nothing to run, is no failure.
    """

    name: str
    what: str
    minutes: float
    by_default: bool
    command: Callable[[Settings], list[str] | Result]
    needs_gpu: bool = False
    no_tests: bool = False


def _build(_: Settings) -> list[str] | Result:
    if not any((ROOT / "csrc").glob("**/*.cu")):
        return Result(SKIPPED, "there are no CUDA sources in this version")
    if shutil.which("nvcc") is None:
        return Result(FAILED, "nvcc is not there to build the CUDA sources")
    return ["env", "GAKERNELS_CUDA_BUILD=force", sys.executable, "setup.py", "build_ext", "--inplace"]


def _tests(_: Settings) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", "(gpu or kernels) and not slow", "-p", "no:cacheprovider", "tests"]


def _sanitizer(tool: str) -> Callable[[Settings], list[str] | Result]:
    def command(_: Settings) -> list[str] | Result:
        if shutil.which("compute-sanitizer") is None:
            return Result(SKIPPED, "compute-sanitizer is not installed")
        watched = [sys.executable, "-m", "benchmarks.one_of_each"]
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *watched]

    return command


def _tune(settings: Settings) -> list[str]:
    table = settings.folder / "tuned.json"
    words = ["--preset", settings.preset, "--dtype", dtype_name(settings.dtype), "--store", str(table)]
    return [sys.executable, "-m", "benchmarks.tune", *words]


def _flash_attention(settings: Settings) -> list[str] | Result:
    if importlib.util.find_spec("flash_attn") is None:
        return Result(SKIPPED, "flash-attn is not installed")
    return _worker(settings)


def _evaluation(settings: Settings) -> list[str] | Result:
    if not DEMO.is_dir():
        return Result(SKIPPED, "the demo model is not part of this installation")
    json_file = settings.folder / "demo.json"
    return [sys.executable, "-m", "gakernels", "demo", "--device", str(settings.device), "--json", str(json_file)]


def _worker(settings: Settings) -> list[str]:
    return [sys.executable, "-m", "benchmarks.worker", *worker.to_words(settings)]


STAGES = (
    Stage("device", "GEMM rate and copy bandwidth of this machine", 0.3, True, _worker),
    Stage("build", "the CUDA sources", 1.0, True, _build),
    Stage(
        "tests", "the tests of the kernels and others that need a GPU", 1.5, True, _tests, needs_gpu=True, no_tests=True
    ),
    Stage("operations", "the operations, forward and backward, by provider", 2.0, True, _worker),
    Stage("training", "a training step against the eager baseline and floors", 2.0, True, _worker),
    Stage("modules", "the modules, forward and backward", 0.6, True, _worker),
    Stage("inference", "contexts of 1K to 128K tokens, decoding, many users", 1.2, True, _worker),
    Stage("many_states", "low_rank_polar for 32 segments or users at once", 2.0, False, _worker),
    Stage("step_variants", "the training step overlapped, compiled, recomputed; its memory", 4.0, False, _worker),
    Stage("step_fp8", "the training step on a base model in FP8", 3.0, False, _worker, needs_gpu=True),
    Stage("step_parts", "loss, norm, activation and rotation against those of others", 1.0, False, _worker),
    Stage("compile", "the operations under torch.compile", 2.0, False, _worker),
    Stage("flash_attention", "inference with flash-attn", 1.0, False, _flash_attention, needs_gpu=True),
    *(
        Stage(tool, f"every kernel once under compute-sanitizer's {tool}", 2.0, False, _sanitizer(tool), needs_gpu=True)
        for tool in ("memcheck", "racecheck", "synccheck")
    ),
    Stage("tune", "launch settings of the kernels, into DIR/tuned.json", 5.0, False, _tune, needs_gpu=True),
    Stage("evaluation", "the demo model's experiment", 2.0, False, _evaluation),
)
NAMES = tuple(stage.name for stage in STAGES)


def run_stage(stage: Stage, settings: Settings, seconds: float) -> Result:
    """Run a stage for at most so long. Its output goes to the terminal and to `<stage>.log` in the folder."""
    settings = replace(settings, stage=stage.name)
    if settings.device.type == "cuda" and not torch.cuda.is_available() and stage.name != "build":
        return Result(FAILED, "there is no GPU that this torch can use; --device cpu measures the CPU")
    if stage.needs_gpu and settings.device.type != "cuda":
        return Result(FAILED, "this stage needs a GPU")
    command = stage.command(settings)
    if isinstance(command, Result):
        return command
    started = time.monotonic()
    for _ in range(MOST_RESTARTS):
        left = seconds - (time.monotonic() - started)
        status = _execute(command, settings.folder / f"{stage.name}.log", left)
        if status != worker.RESTART:
            break
    return replace(_result(stage, status), seconds=time.monotonic() - started)


def _result(stage: Stage, status: int | None) -> Result:
    if status is None:
        return Result(NO_TIME, "cut off: the time was over; what it had measured is kept")
    if status == 0:
        return Result(DONE)
    if status == 5 and stage.no_tests:
        return Result(SKIPPED, "no test is marked `gpu` or `kernels`")
    if status == worker.RESTART:
        return Result(FAILED, "the GPU context broke again and again")
    signalled = f"it was ended by signal {-status}" if status < 0 else f"exit status {status}"
    return Result(FAILED, f"{signalled}; see {stage.name}.log")


def _execute(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Exit status of a command, or None if it ran out of time and was ended with its children."""
    if seconds <= 0:
        return None
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        deadline = time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < deadline:
                _copy(process.stdout.read(), file)
                time.sleep(0.05)
        finally:
            ended = process.poll()
            if ended is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        _copy(process.stdout.read(), file)
    return ended


def _copy(text: bytes | None, file: IO[bytes]) -> None:
    if text:
        file.write(text)
        file.flush()
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()


# What was done before


def read_results(folder: Path) -> dict[str, dict[str, object]]:
    """How the stages of earlier runs into the folder ended, with what they were run for."""
    file = folder / "stages.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_result(folder: Path, name: str, result: Result, run: dict[str, str]) -> None:
    """Note how a stage ended; the file is replaced as a whole."""
    results = read_results(folder) | {name: {**asdict(result), **run}}
    temporary = folder / "stages.json.tmp"
    temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / "stages.json")
