"""How a stage of the GPU suite is run: in a process of its own, for a limited time, its output kept in `log.txt`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.rows import ROOT, commit, read_rows

DONE, SKIPPED, FAILED, NO_TIME = "done", "skipped", "failed", "not run"
RESTART = 75  # exit status of a worker whose GPU context is broken: another one goes on behind that case
NOTHING_HERE = 4  # exit status of a command that has nothing to measure on this machine
MOST_RESTARTS = 20


@dataclass(frozen=True)
class Run:
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
class Result:
    """How a stage ended, and a word about it."""

    status: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One part of a plan.

    Attributes:
        name, what: for the user.
        seconds: its limit; what it has written until then is kept.
        command: from the run and the seconds that are left for it to the command line, or to a Result that says at
            once why there is nothing to run.
        needs_gpu: whether a rehearsal leaves it out.
    """

    name: str
    what: str
    seconds: float
    command: Callable[[Run, float], list[str] | Result]
    needs_gpu: bool = False


def run_stage(stage: Stage, run: Run, seconds: float) -> Result:
    """Run a stage for at most so long, and at most for its own limit."""
    if stage.needs_gpu and run.rehearsal:
        return Result(SKIPPED, "needs a GPU")
    if not run.rehearsal and not torch.cuda.is_available():
        return Result(FAILED, "there is no GPU that this torch can use; --rehearse runs the plan on the CPU")
    started = time.monotonic()
    deadline = started + min(seconds, stage.seconds)
    command = stage.command(run, deadline - started)
    if isinstance(command, Result):
        return command
    status: int | None = None
    for _ in range(MOST_RESTARTS):
        status = execute(command, run.folder / "log.txt", deadline - time.monotonic())
        if status != RESTART:
            break
    return replace(_result(status), seconds=time.monotonic() - started)


def _result(status: int | None) -> Result:
    if status is None:
        return Result(NO_TIME, "cut off: the time was over; what it had written is kept")
    if status == 0:
        return Result(DONE)
    if status == NOTHING_HERE:
        return Result(SKIPPED, "nothing of it can run here; see log.txt")
    if status == RESTART:
        return Result(FAILED, "the GPU context broke again and again")
    signalled = f"it was ended by signal {-status}" if status < 0 else f"exit status {status}"
    return Result(FAILED, f"{signalled}; see log.txt")


def execute(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Exit status of a command, or None if it ran out of time and was ended with its children.

    Its output goes to the end of the log and, from there, to the terminal.
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


# What was done before


def run_stages(stages: Sequence[Stage], run: Run, seconds: float) -> dict[str, Result]:
    """Run the stages one after the other; whatever happens to one, the others go on while there is time.

    Those that were done in this folder for this commit and device are left out.
    """
    identity = {"commit": commit(), "device": run.device.type}
    deadline = time.monotonic() + seconds
    results: dict[str, Result] = {}
    for stage in stages:
        heading = f"\n== {stage.name}: {stage.what}"
        print(heading, flush=True)
        before = read_results(run.folder).get(stage.name, {})
        if before.get("status") == DONE and identity.items() <= before.items():
            results[stage.name] = Result(DONE, "in an earlier run")
        elif time.monotonic() >= deadline:
            results[stage.name] = Result(NO_TIME, "the time was over before it began")
        else:
            with (run.folder / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"{heading}\n")
            results[stage.name] = run_stage(stage, run, deadline - time.monotonic())
            _write_result(run.folder, stage.name, results[stage.name], identity)
        print(f"{stage.name}: {results[stage.name].status} {results[stage.name].detail}".rstrip(), flush=True)
    return results


def read_results(folder: Path) -> dict[str, dict[str, object]]:
    """How the stages of earlier runs into the folder ended, with what they were run for."""
    file = folder / "stages.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write_result(folder: Path, name: str, result: Result, identity: dict[str, str]) -> None:
    """Note how a stage ended; the file is replaced as a whole."""
    results = read_results(folder) | {name: {**asdict(result), **identity}}
    temporary = folder / "stages.json.tmp"
    temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / "stages.json")
