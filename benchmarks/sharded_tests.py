"""The tests of the kernels in many processes at once; nothing but pytest is needed.

    python -m benchmarks.sharded_tests --processes 14 --seconds 90

Every process takes a part of the tests (`pytest --shard K/N`, tests/sharding.py) out of the files in which some are
marked `gpu` or `kernels`. What a process has to say is printed as soon as it has ended. When the time is over the
others are interrupted, say what failed until then, and count as failed.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # not from `rows`: nothing here needs PyTorch
MARKED = "(gpu or kernels) and not slow"
PASSED, NO_TESTS = 0, 5  # exit statuses of pytest
GRACE = 8.0  # seconds that an interrupted process has to say what failed


@dataclass(frozen=True)
class Part:
    """A process of pytest and the file of its output."""

    name: str
    process: subprocess.Popen[bytes]
    output: Path


def kernel_files() -> list[str]:
    """The test files in which something is marked `gpu` or `kernels`."""
    marked = re.compile(r"mark\.(gpu|kernels)\b")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if marked.search(file.read_text(encoding="utf-8"))]


def run(paths: Sequence[str], processes: int, seconds: float, marked: str = MARKED) -> int:
    """Run the tests; returns 0 if all passed, NO_TESTS if there were none, else 1."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        parts = [_start(paths, number, processes, marked, Path(folder)) for number in range(1, processes + 1)]
        try:
            statuses = _collect(parts, deadline)
        finally:
            for part in parts:
                part.process.kill()
    if any(status not in (PASSED, NO_TESTS) for status in statuses):
        return 1
    return PASSED if PASSED in statuses else NO_TESTS


def _start(paths: Sequence[str], number: int, count: int, marked: str, folder: Path) -> Part:
    options = ["-m", marked, "-p", "no:cacheprovider", "--tb=short", "-rfEs", "--shard", f"{number}/{count}"]
    output = folder / f"{number}.log"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *paths],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            preexec_fn=_heed_interrupts,
        )
    return Part(f"{number}/{count}", process, output)


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _collect(parts: Iterable[Part], deadline: float) -> list[int]:
    """Print each part's output when it ends; the exit statuses."""
    running, statuses = list(parts), []
    interrupted = False
    while running:
        for part in [part for part in running if part.process.poll() is not None]:
            running.remove(part)
            status = part.process.returncode
            statuses.append(status)
            print(f"-- part {part.name}: exit status {status}\n{part.output.read_text(errors='replace')}", flush=True)
        now = time.monotonic()
        if now >= deadline + GRACE:
            _signal(running, signal.SIGKILL)
        elif now >= deadline and not interrupted:
            interrupted = True
            print(f"the time is over for part {', '.join(part.name for part in running)}", flush=True)
            _signal(running, signal.SIGINT)
        time.sleep(0.05)
    return statuses


def _signal(parts: Iterable[Part], number: signal.Signals) -> None:
    for part in parts:
        with contextlib.suppress(ProcessLookupError):
            part.process.send_signal(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded_tests", description=__doc__)
    parser.add_argument("paths", nargs="*", help="default: every file with a marked test")
    parser.add_argument("--processes", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--seconds", type=float, default=600.0, help="interrupt what runs after so long")
    parser.add_argument("-m", dest="marked", default=MARKED, help="which tests, as for pytest (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, but it is {options.processes}")
    return run(options.paths or kernel_files(), options.processes, options.seconds, options.marked)


if __name__ == "__main__":
    sys.exit(main())
