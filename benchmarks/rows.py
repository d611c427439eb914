"""Rows of results: one JSON object per line, appended and flushed one by one, each with device, versions and commit.

    python -m benchmarks.rows collect DIR
    python -m benchmarks.rows compare A B
    python -m benchmarks.rows defaults benchmarks/results/nvidia-h200/rows.jsonl

`collect` adds the rows of a run to `benchmarks/results/<device>/rows.jsonl`. `compare` prints the ratios B / A with
their spread. `defaults` writes the choice between the backends on a GPU, `gakernels/ops/measured/<gpu>.json`.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Ceilings, Timing
from gakernels.errors import InputError
from gakernels.files import write_text
from gakernels.ops import gpus, measured
from gakernels.ops.dispatch import OPERATIONS

Key = tuple[str | int, ...]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
COMMIT_VARIABLE = "GAKERNELS_COMMIT"

OK = "ok"
FLOOR = "floor"  # timed, but computes less: a lower limit, never a rival
OTHER = "other"  # timed, but computes something else with the same purpose
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
class ResultRow:
    """One measured case, or the reason why there is no number.

    Attributes:
        kernel: the operation, module or task (`low_rank_polar`, `train_step`, ...).
        provider: name of the provider.
        mode: `forward`, `backward`, `step`, ...
        shape: the sizes, as text.
        dtype: of the inputs.
        status: one of STATUSES; only those in TIMED have times.
        detail: the reason, if the status needs one.
        p20_ms, p50_ms, p80_ms: percentiles of the samples.
        samples: number of repetitions.
        cache: how the cache was treated.
        peak_bytes: memory of the call, see `measure.peak_bytes`.
        flops, bytes: operations that the case needs, and the least bytes (each input read once, each output written
            once).
        gemm_share, copy_share: achieved rates over the measured ceilings.
        error: largest relative distance to the oracle, over output and gradients.
        metrics: further numbers by name, such as `tokens_per_s`.
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
        """A flat dictionary: the entries of the row and of its environment."""
        values = asdict(self)
        environment = values.pop("environment")
        return {**values, **environment}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ResultRow":
        """The inverse of `to_dict`. Raises: TypeError, ValueError: an entry is missing, unknown or wrong."""
        of_environment = {entry.name for entry in fields(Environment)}
        environment = Environment(**{name: value for name, value in values.items() if name in of_environment})
        own = {name: value for name, value in values.items() if name not in of_environment}
        return cls(**own, environment=environment)


def rates(
    timing: Timing, flops: float | None, moved_bytes: float | None, dtype: str, ceilings: Ceilings | None
) -> dict[str, float | None]:
    """The shares of the measured ceilings, as arguments for a `ResultRow`."""
    seconds = timing.p50_ms * 1e-3
    gemm = ceilings.gemm_flops.get(dtype) if ceilings else None
    return {
        "gemm_share": flops / seconds / gemm if flops and gemm else None,
        "copy_share": moved_bytes / seconds / ceilings.copy_bandwidth if moved_bytes and ceilings else None,
    }


def times(timing: Timing) -> dict[str, Any]:
    """The percentiles of a timing, as arguments for a `ResultRow`."""
    return {
        "p20_ms": timing.p20_ms,
        "p50_ms": timing.p50_ms,
        "p80_ms": timing.p80_ms,
        "samples": len(timing.samples_ms),
        "cache": timing.cache,
    }


class RowWriter:
    """Appends rows to a JSON-lines file; each is on disk before the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(path)

    def write(self, row: ResultRow) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row.to_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[ResultRow]:
    """The rows of a JSON-lines file, or of all such files in a folder and its subfolders.

    A last line that was cut off is left out.

    Raises:
        ValueError: there is no such file, or another line is damaged.
    """
    if path.is_dir():
        return [row for file in sorted(path.rglob("*.jsonl")) for row in read_rows(file)]
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    return list(parse_rows(path.read_text(encoding="utf-8"), str(path)))


def parse_rows(text: str, source: str) -> Iterator[ResultRow]:
    """The rows of JSON lines. Raises: ValueError: a line other than the last is damaged."""
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield ResultRow.from_dict(json.loads(line))
        except (TypeError, ValueError) as error:
            if number == len(lines) and not text.endswith("\n"):
                return
            raise ValueError(f"{source}, line {number}, is not a row of results: {error}") from error


def _end_last_line(path: Path) -> None:
    """Drop a last line that an interrupted run cut off, so that the next row does not continue it."""
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
    """The commit, followed by `+` if the library or the benchmarks differ from it; `unknown` without git.

    If the sources were copied without their history, the variable GAKERNELS_COMMIT names their commit.
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
    """The clocks that the driver reports, e.g. `1980 MHz SM, 3201 MHz memory`."""
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
    """The standard output of a command; empty if it can't run or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def newest(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Of the rows with the same case, provider and device, the last one."""
    return list({key(row): row for row in rows}.values())


def key(row: ResultRow) -> Key:
    """What makes two rows comparable: the same case and provider on the same device."""
    return (*row.case, row.provider, row.environment.device, row.environment.threads)


# Keep rows


def collect(source: Path, results: Path) -> int:
    """Add the rows of a run that are not there yet; nothing is ever changed or removed.

    Returns:
        The number of new rows.

    Raises:
        ValueError: a file is missing or damaged.
    """
    known = read_rows(results) if results.is_dir() else []
    new = [row for row in read_rows(source) if row not in known]
    for row in new:
        RowWriter(results / row.environment.folder / "rows.jsonl").write(row)
    return len(new)


# Compare rows


@dataclass(frozen=True)
class Ratio:
    """Time in B over time in A: of the medians, and from the most favourable to the least favourable percentiles."""

    median: float
    low: float  # p20 of B over p80 of A
    high: float  # p80 of B over p20 of A

    def verdict(self, limit: float) -> str:
        """`slower` or `faster` if the medians differ by more than the limit and the spreads do not overlap."""
        if self.median > limit and self.low > 1:
            return "slower"
        if self.median < 1 / limit and self.high < 1:
            return "faster"
        return ""


def ratio(a: ResultRow, b: ResultRow) -> Ratio:
    """Raises: ValueError: a row has no time."""
    times = [(row.p20_ms, row.p50_ms, row.p80_ms) for row in (a, b)]
    (a20, a50, a80), (b20, b50, b80) = times
    if a20 is None or a50 is None or a80 is None or b20 is None or b50 is None or b80 is None:
        raise ValueError("a row without a time has no ratio")
    return Ratio(b50 / a50, b20 / a80, b80 / a20)


def load(name: str, results: Path) -> list[ResultRow]:
    """The newest row of each case, from a file or folder, or from a commit in the folder of results.

    Raises:
        ValueError: there is neither such a file nor a row of such a commit, or a file is damaged.
    """
    if Path(name).exists():
        rows = read_rows(Path(name))
    else:
        rows = [row for row in read_rows(results) if _same_commit(row.environment.commit, name)]
        if not rows:
            raise ValueError(f"{name!r} is no file, and no row in {results} was measured at such a commit")
    return newest(rows)


def _same_commit(commit: str, name: str) -> bool:
    """Both may be abbreviated. A commit with changes on top, `abc+`, is not the same as `abc`."""
    if len(name) < 4 or commit.endswith("+") != name.endswith("+"):
        return False
    commit, name = commit.rstrip("+"), name.rstrip("+")
    return commit.startswith(name) or name.startswith(commit)


def compare(a: Iterable[ResultRow], b: Iterable[ResultRow], limit: float) -> tuple[list[str], int]:
    """The lines of the table, and the number of cases that got slower or broke."""
    before, after = ({key(row): row for row in rows} for rows in (a, b))
    lines = [f"{'case':64} {'provider':12} {'A ms':>9} {'B ms':>9} {'B/A':>6}  spread"]
    worse = 0
    for name in (name for name in before if name in after):
        old, new = before[name], after[name]
        case = f"{old.kernel} {old.mode} {old.shape} {old.dtype}"
        if old.p50_ms is None:  # it was wrong, or it is a measured ceiling
            continue
        if new.status not in TIMED:
            worse += 1
            lines.append(f"{case:64.64} {old.provider:12.12} {old.p50_ms:9.4g} {new.status:>9.9}  {new.detail}")
            continue
        found = ratio(old, new)
        verdict = found.verdict(limit)
        worse += verdict == "slower"
        spread = f"{found.low:.2f}..{found.high:.2f}"
        times = f"{old.p50_ms:9.4g} {new.p50_ms:9.4g} {found.median:6.3f}"
        lines.append(f"{case:64.64} {old.provider:12.12} {times}  {spread} {verdict}".rstrip())
    only = len(before.keys() ^ after.keys())
    lines.append(f"{len(before.keys() & after.keys())} in both, {only} in one only, {worse} worse")
    return lines, worse


def compare_sets(a: str, b: str, results: Path, limit: float) -> tuple[list[str], int]:
    """`compare` for two names. Raises: ValueError: one is unknown, or they have no case in common."""
    if not limit >= 1:
        raise ValueError(f"--limit must be at least 1, but it is {limit:g}")
    before, after = load(a, results), load(b, results)
    if not {key(row) for row in before} & {key(row) for row in after}:
        raise ValueError("A and B have no case, provider and device in common")
    return compare(before, after, limit)


# The choice between the backends on a GPU: from committed rows, never edited by hand

BACKENDS = ("eager", "triton", "cuda")
PASSES = ("forward", "backward")
# The names in a row's shape, and the operations' names.
SIZE_NAMES = {"T": "batch", "windows": "batch", "M": "tokens", "d_h": "hidden", "d_r": "state", "r": "rank"}
SIZE_NAMES |= {"d_in": "in", "d_out": "out", "numbers": "numbers"}


def documents(rows: Iterable[ResultRow]) -> dict[str, dict[str, Any]]:
    """The file of each GPU. Later rows of the same case and provider replace earlier ones.

    Raises:
        InputError: the compute capability of a GPU is not known (`gpus.known`).
    """
    found: dict[str, dict[str, Any]] = {}
    cases: dict[tuple[str, ...], dict[tuple[str, str], ResultRow]] = defaultdict(dict)
    for row in rows:
        if row.environment.kind != "gpu":
            continue
        gpu = row.environment.device
        if gpu not in found:
            capability = list(gpus.known(gpu).capability)
            found[gpu] = {"gpu": gpu, "capability": capability, "gemm_flops": {}, "copy_bytes": 0.0, "rows": []}
        if row.kernel == "ceiling" and row.mode == "gemm":
            found[gpu]["gemm_flops"][row.dtype] = row.metrics["flops_per_s"]
        elif row.kernel == "ceiling" and row.mode == "copy":
            found[gpu]["copy_bytes"] = row.metrics["bytes_per_s"]
        elif row.kernel in OPERATIONS:
            cases[gpu, row.kernel, row.shape, row.dtype, row.environment.commit][row.provider, row.mode] = row
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for (gpu, operation, shape, dtype, commit), passes in cases.items():
        times = _median_times(passes)
        if len(times) > 1:
            newest[gpu, operation, shape, dtype] = _entry(operation, shape, dtype, commit, times)
    for (gpu, *_), entry in newest.items():
        found[gpu]["rows"].append(entry)
    return {gpu: document for gpu, document in found.items() if document["rows"] and document["copy_bytes"]}


def _median_times(passes: dict[tuple[str, str], ResultRow]) -> dict[str, list[float]]:
    """Median times of forward and backward by provider, of those that were correct in both."""
    found = {}
    for provider in BACKENDS:
        rows = [row for mode in PASSES if (row := passes.get((provider, mode))) is not None and row.status == OK]
        if len(rows) == len(PASSES):
            found[provider] = [round(row.p50_ms or 0.0, 4) for row in rows]
    return found


def _entry(operation: str, shape: str, dtype: str, commit: str, times: dict[str, list[float]]) -> dict[str, Any]:
    sizes = {SIZE_NAMES[name]: int(value) for name, value in (part.split("=") for part in shape.split())}
    if operation == "low_rank_polar":
        sizes["power_iterations"] = 1  # the suites measure no other value
    return {"operation": operation, "dtype": dtype, "sizes": sizes, "milliseconds": times, "commit": commit}


def write_defaults(files: Sequence[Path], folder: Path) -> list[str]:
    """Write one file per GPU; returns a line for each case. Raises: ValueError: a file is missing, or a GPU unknown."""
    try:
        found = documents(row for path in files for row in read_rows(path))
    except InputError as error:
        raise ValueError(str(error)) from error
    lines = []
    for gpu, document in found.items():
        write_text(folder / f"{gpus.slug(gpu)}.json", json.dumps(document, indent=1) + "\n")
        rows = document["rows"]
        lines += [f"{gpu}: {row['operation']} {row['dtype']} {row['sizes']} {row['milliseconds']}" for row in rows]
    return lines or ["no case was measured with several backends that are right; nothing was written"]


# Command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    keeping = commands.add_parser("collect", help="keep the rows of a run; can be repeated")
    keeping.add_argument("source", type=Path, help="what `benchmarks.gpu_suite --out` or `pytest --rows` wrote")
    comparing = commands.add_parser("compare", help="status 1 if a case of B became slower or lost its time")
    comparing.add_argument("a", help="file or folder of rows, or a commit")
    comparing.add_argument("b", help="the same; its times stand above the fraction line")
    comparing.add_argument("--limit", type=float, default=1.1, help="smallest ratio that counts (default: %(default)g)")
    for command in (keeping, comparing):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows that are kept")
    deciding = commands.add_parser("defaults", help="measurements for the dispatch")
    deciding.add_argument("rows", nargs="+", type=Path, help="result files (rows.jsonl)")
    deciding.add_argument("--folder", type=Path, default=measured.FOLDER, help="where the files go")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command. Status 2 if an argument or a file is bad."""
    options = _parser().parse_args(words)
    lines, worse = [], 0
    try:
        if options.command == "collect":
            lines = [f"{collect(options.source, options.results)} new rows in {options.results}"]
        elif options.command == "compare":
            lines, worse = compare_sets(options.a, options.b, options.results, options.limit)
        else:
            lines = write_defaults(options.rows, options.folder)
    except (ValueError, OSError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return int(worse > 0)


if __name__ == "__main__":
    raise SystemExit(main())
