"""Rows of results: one JSON object a line, appended and flushed one by one, each with device, versions and commit."""

import csv
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Ceilings, Timing

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
COMMIT_VARIABLE = "GAKERNELS_COMMIT"

OK = "ok"
FLOOR = "floor"  # timed, but it computes less: a lower limit, never a rival
OTHER = "other"  # timed, but it computes something else with the same purpose
TIMED = (OK, FLOOR, OTHER)
WRONG = "wrong"  # disagrees with the oracle: no time
UNAVAILABLE = "not available"
OUT_OF_MEMORY = "out of memory"
FAILED = "failed"
STATUSES = (*TIMED, WRONG, UNAVAILABLE, OUT_OF_MEMORY, FAILED)
BAD_STATUSES = (WRONG, OUT_OF_MEMORY, FAILED)  # these make a run end with a nonzero exit status


@dataclass(frozen=True)
class Environment:
    """Where and with what a row was measured."""

    device: str
    kind: str  # gpu or cpu
    clocks: str
    threads: int
    torch: str
    triton: str
    cuda: str
    python: str
    commit: str
    date: str

    @property
    def folder(self) -> str:
        """Name of this device's folder under `benchmarks/results`."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")


@dataclass(frozen=True)
class Row:
    """One measured case, or the reason why there is no number.

    Attributes:
        kernel: the operation, module or task (`low_rank_polar`, `train_step`, ...).
        provider: who computes it.
        mode: `forward`, `backward`, `step`, ...
        shape: the sizes, as text.
        dtype: of the inputs.
        status: one of STATUSES; times are there only for those in TIMED.
        detail: why, where the status needs a word.
        p20_ms, p50_ms, p80_ms: percentiles of the samples.
        samples: number of repetitions.
        cache: how the cache was treated.
        peak_bytes: memory of the call, see `measure.peak_bytes`.
        flops, bytes: operations that the case needs, and the fewest bytes (each input read once, each output written
            once).
        gemm_share, copy_share: achieved rates over the measured ceilings.
        error: largest relative distance to the oracle, over output and gradients.
        metrics: further numbers by name, as `tokens_per_s`.
        environment: where it was measured.
    """

    kernel: str
    provider: str
    mode: str
    shape: str
    dtype: str
    status: str
    environment: Environment
    detail: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    cache: str = ""
    peak_bytes: int | None = None
    flops: float | None = None
    bytes: float | None = None
    gemm_share: float | None = None
    copy_share: float | None = None
    error: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, but it is {self.status!r}")
        if self.p50_ms is not None and self.status not in TIMED:
            raise ValueError(f"a row with status {self.status!r} must not have a time")

    @property
    def case(self) -> tuple[str, str, str, str]:
        """What was measured: kernel, mode, shape and dtype."""
        return self.kernel, self.mode, self.shape, self.dtype

    def to_dict(self) -> dict[str, Any]:
        """Flat: the environment's entries beside the row's own."""
        values = asdict(self)
        environment = values.pop("environment")
        return {**values, **environment}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Row":
        """The opposite of `to_dict`. Raises: TypeError, ValueError: an entry is missing, unknown or wrong."""
        of_environment = {entry.name for entry in fields(Environment)}
        environment = Environment(**{name: value for name, value in values.items() if name in of_environment})
        own = {name: value for name, value in values.items() if name not in of_environment}
        return cls(**own, environment=environment)


def rates(
    timing: Timing, flops: float | None, moved_bytes: float | None, dtype: str, ceilings: Ceilings | None
) -> dict[str, float | None]:
    """The shares of the measured ceilings, as arguments for a `Row`."""
    seconds = timing.p50_ms * 1e-3
    gemm = ceilings.gemm_flops.get(dtype) if ceilings else None
    return {
        "gemm_share": flops / seconds / gemm if flops and gemm else None,
        "copy_share": moved_bytes / seconds / ceilings.copy_bandwidth if moved_bytes and ceilings else None,
    }


def times(timing: Timing) -> dict[str, Any]:
    """The percentiles of a timing, as arguments for a `Row`."""
    return {
        "p20_ms": timing.p20_ms,
        "p50_ms": timing.p50_ms,
        "p80_ms": timing.p80_ms,
        "samples": len(timing.samples_ms),
        "cache": timing.cache,
    }


class RowWriter:
    """Appends rows to a JSON-lines file and, if wanted, a CSV file beside it; each is on disk before the next one."""

    def __init__(self, path: Path, with_csv: bool = True) -> None:
        self.path, self.csv_path, self.with_csv = path, path.with_suffix(".csv"), with_csv
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(path)

    def write(self, row: Row) -> None:
        values = row.to_dict()
        _append(self.path, json.dumps(values) + "\n")
        if not self.with_csv:
            return
        columns = list(values)
        is_new = not self.csv_path.exists() or self.csv_path.stat().st_size == 0
        with self.csv_path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            if is_new:
                writer.writeheader()
            writer.writerow({**values, "metrics": json.dumps(values["metrics"])})


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file, or of all such files in a folder and below it.

    A last line that was cut off is left out.

    Raises:
        ValueError: there is no such file, or another line is damaged.
    """
    if path.is_dir():
        return [row for file in sorted(path.rglob("*.jsonl")) for row in read_rows(file)]
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    return list(parse_rows(path.read_text(encoding="utf-8"), str(path)))


def parse_rows(text: str, source: str) -> Iterator[Row]:
    """The rows of JSON lines. Raises: ValueError: a line that is not the last is damaged."""
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield Row.from_dict(json.loads(line))
        except (TypeError, ValueError) as error:
            if number == len(lines) and not text.endswith("\n"):
                return
            raise ValueError(f"{source}, line {number}, is not a row of results: {error}") from error


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _end_last_line(path: Path) -> None:
    """Drop a line that an interrupted run cut off, so that the next row does not continue it."""
    if not path.is_file():
        return
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(text.rfind(b"\n") + 1)


def environment(device: torch.device) -> Environment:
    """This machine, these versions and this commit."""
    is_gpu = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if is_gpu else _cpu_name(),
        kind="gpu" if is_gpu else "cpu",
        clocks=_clocks() if is_gpu else "",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda or "none",
        python=platform.python_version(),
        commit=commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def commit() -> str:
    """The commit, with `+` behind it if the library or the benchmarks differ from it; `unknown` without git.

    Where the sources were copied without their history, the variable GAKERNELS_COMMIT says what they are.
    """
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given
    head = command_output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    sources = ("gakernels", "csrc", "benchmarks/*.py")
    changed = command_output("git", "-C", str(ROOT), "status", "--porcelain", "--", *sources)
    return head + ("+" if changed else "")


def _clocks() -> str:
    """What the driver reports, e.g. `1980 MHz SM, 3201 MHz memory`."""
    query = "clocks.current.sm,clocks.current.memory"
    answer = command_output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits").splitlines()
    parts = [part.strip() for part in answer[0].split(",")] if answer else []
    return f"{parts[0]} MHz SM, {parts[1]} MHz memory" if len(parts) == 2 else "unknown"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def command_output(*command: str) -> str:
    """Standard output of a command, or nothing if it can't run or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of the rows of the same case, provider and device, the one that came last."""
    chosen = {(row.environment.device, row.environment.threads, *row.case, row.provider): row for row in rows}
    return list(chosen.values())
