"""Parts of the tests for processes that run side by side: `pytest --shard 2/14` runs the second of 14.

Which tests are in a part follows from what was collected alone. Those marked `large` are a part of their own: together
they would need more memory than a GPU has.

    python tests/sharding.py --processes 14 --seconds 90

runs a part in each process, out of the files in which some tests are marked `gpu` or `kernels`; nothing but pytest is
needed. What a process has to say is printed as soon as it has ended. When the time is over the others are interrupted,
say what failed until then, and count as failed.
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
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
MARKED = "(gpu or kernels) and not slow"
PASSED, NO_TESTS = 0, 5  # exit statuses of pytest
GRACE = 8.0  # seconds that an interrupted process has to say what failed


class Shard(NamedTuple):
    """The part `number`, from 1 to `count`."""

    number: int
    count: int


def parse(text: str) -> Shard:
    """Raises: argparse.ArgumentTypeError: it is not K/N with 1 <= K <= N."""
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdecimal() for part in parts) and 1 <= int(parts[0]) <= int(parts[1]):
        return Shard(int(parts[0]), int(parts[1]))
    raise argparse.ArgumentTypeError(f"must be K/N, the K-th of N parts, but it is {text!r}")


def part_of(items: Sequence[pytest.Item], shard: Shard) -> list[pytest.Item]:
    """The items of a part: the large ones are the last, all others are dealt out one by one."""
    large = [item for item in items if item.get_closest_marker("large")]
    if shard.count == 1 or not large:
        return list(items[shard.number - 1 :: shard.count])
    if shard.number == shard.count:
        return large
    return [item for item in items if not item.get_closest_marker("large")][shard.number - 1 :: shard.count - 1]


# All parts at once


@dataclass(frozen=True)
class PartProcess:
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


def _start(paths: Sequence[str], number: int, count: int, marked: str, folder: Path) -> PartProcess:
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
    return PartProcess(f"{number}/{count}", process, output)


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _collect(parts: Iterable[PartProcess], deadline: float) -> list[int]:
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


def _signal(parts: Iterable[PartProcess], number: signal.Signals) -> None:
    for part in parts:
        with contextlib.suppress(ProcessLookupError):
            part.process.send_signal(number)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python tests/sharding.py", description=__doc__)
    parser.add_argument("paths", nargs="*", help="default: every file with a marked test")
    parser.add_argument("--processes", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--seconds", type=float, default=600.0, help="interrupt what runs after so long")
    parser.add_argument("-m", dest="marked", default=MARKED, help="which tests, as for pytest (default: %(default)s)")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, but it is {options.processes}")
    return run(options.paths or kernel_files(), options.processes, options.seconds, options.marked)


if __name__ == "__main__":
    sys.exit(main())
