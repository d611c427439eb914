"""Turn the rows of results into docs/results.md: `python -m benchmarks.report`.

Takes the newest row of each case, provider and device. The page has the medians side by side; everything else in a
row goes to `benchmarks/results/<device>/rows.csv`. The plots need matplotlib (`pip install gakernels[plots]`).
"""

import argparse
import csv
import io
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite import floor_ms
from benchmarks.measure import HARDWARE
from benchmarks.rows import RESULTS, ROOT, TIMED, UNAVAILABLE, Environment, ResultRow, newest, read_rows
from gakernels.files import write_text

OPERATIONS = ("context_state", "low_rank_polar", "lowrank_linear")
KERNELS = {
    "context_state": "The states of T chunks of M tokens",
    "low_rank_polar": "The norm of T states",
    "lowrank_linear": "A frozen linear layer with an adapter for each window of M tokens",
    "gated_product": "silu(gate) * up",
    "AdapterGenerator": "A generator: T chunks in, T adapters out",
    "AdaptedLinear": "A linear layer that carries adapters",
    "train_step": "A training step",
    "contextualisation": "Reading a context",
    "decoding": "Greedy decoding",
    "adapter_generation": "The adapters of many users' contexts of two chunks",
}
MODES = ("forward", "backward", "inference")
LEAST = "least possible, computed"

INTRODUCTION = """# Results

`python -m benchmarks.report` generates this page from the rows in `benchmarks/results/`; don't edit it.
[benchmarks.md](benchmarks.md) explains how the numbers are measured and what the providers are. Percentiles, memory,
shares of the measured rates and errors of every row are in `benchmarks/results/<device>/rows.csv`. The results of
pretraining are in [pretraining.md](pretraining.md).

Times are medians in milliseconds, forward / backward if both were measured. *(floor)* computes less than the case, a
lower limit; *(other)* computes something else with the same purpose. The least possible time of a GPU is that of the
counted operations at its bfloat16 rate or of the fewest bytes at its bandwidth, whichever is longer. A case that
disagrees with the float64 oracle has no time.
"""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows (default: benchmarks/results)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    options = parser.parse_args(words)
    try:
        rows = newest(read_rows(options.results)) if options.results.is_dir() else []
        plots = [] if options.no_plots else draw(rows, options.out.parent / "plots")
        write_text(options.out, document(rows, plots))
        for folder in dict.fromkeys(row.environment.folder for row in rows):
            own = [row for row in rows if row.environment.folder == folder]
            write_text(options.results / folder / "rows.csv", to_csv(own))
    except (ValueError, OSError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(rows)} rows, {len(plots)} plots")
    return 0


# The page


def document(rows: Sequence[ResultRow], plots: Sequence[Path] = ()) -> str:
    """The whole page: the devices, a table for each kernel, the plots."""
    rows = sorted(rows, key=lambda row: row.environment.kind != "gpu")
    lines = [INTRODUCTION, "## Where and when\n", *environments(rows)]
    for kernel, title in KERNELS.items():
        own = [row for row in rows if row.kernel == kernel and row.status != UNAVAILABLE]
        lines += ["", f"## {title}: `{kernel}`\n"]
        if not any(row.environment.kind == "gpu" for row in own):
            lines += ["**Not yet run** on a GPU (`python -m benchmarks.gpu_suite`).\n"]
        if own:
            lines += steps(own) if kernel == "train_step" else side_by_side(own)
    lines += ["", "## Plots", ""] if plots else []
    lines += [f"![{path.stem}](plots/{path.name})" for path in plots]
    return "\n".join(lines) + "\n"


def environments(rows: Sequence[ResultRow]) -> list[str]:
    """A line for each device, versions and commit, with the measured kernels and the device's measured rates."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(heading(row.environment), []).append(row)
    lines = []
    for name, own in groups.items():
        dates = sorted({row.environment.date[:10] for row in own})
        what = ", ".join(dict.fromkeys(row.kernel for row in own if row.kernel != "ceiling"))
        rates = [f"{row.mode} ({row.dtype}) {_rate_text(row)}" for row in own if row.kernel == "ceiling"]
        text = "; ".join(filter(None, (what, f"measured {', '.join(rates)}" if rates else "")))
        lines.append(f"- **{name}**, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}: {text}")
    return lines


def heading(where: Environment) -> str:
    """Device, versions and commit."""
    clocks = f", {where.clocks}" if where.clocks else ""
    versions = f"torch {where.torch}, Triton {where.triton}, CUDA {where.cuda}, Python {where.python}"
    return f"{device_name(where)}{clocks}; {versions}; commit {where.commit}"


def device_name(where: Environment) -> str:
    return where.device if where.kind == "gpu" else f"{where.device}, {where.threads} thread(s)"


def _rate_text(row: ResultRow) -> str:
    (name, value), *_ = row.metrics.items()
    return f"{value / 1e12:.3g} {'TFLOP/s' if name == 'flops_per_s' else 'TB/s'}"


def side_by_side(rows: Sequence[ResultRow]) -> list[str]:
    """A line for each size, a column for each provider."""
    timed = [row for row in rows if row.status in TIMED and row.status != "ok"]
    notes = {row.provider: f"{row.provider} ({row.status})" for row in timed}
    providers = list(dict.fromkeys(row.provider for row in rows))
    cases: dict[tuple[str, ...], list[ResultRow]] = {}
    for row in sorted(rows, key=lambda row: (row.environment.kind != "gpu", _numbers(row.shape))):
        where = row.environment
        cases.setdefault((device_name(where), where.commit, row.shape, row.dtype), []).append(row)
    least = {case: _least(own) for case, own in cases.items()}
    heads = ["device", "commit", "size", "dtype", *(notes.get(name, name) for name in providers)]
    lines = []
    for case, own in cases.items():
        cells = [_passes(name, own) for name in providers]
        lines.append([*case, *cells, *([least[case]] if any(least.values()) else [])])
    return _markdown([*heads, *([LEAST] if any(least.values()) else [])], lines)


def _numbers(shape: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", shape)]


def _passes(provider: str, rows: Sequence[ResultRow]) -> str:
    """The medians of a provider in a case, forward before backward; `-` for a pass that only other providers have."""
    found = {row.mode: time_text(row) for row in rows if row.provider == provider}
    there = {row.mode for row in rows}
    return " / ".join(found.get(mode, "-") for mode in MODES if mode in there) if found else ""


def _least(rows: Sequence[ResultRow]) -> str:
    """The floor of the device in each pass, if a row counts its work and the device's rates are known."""
    found: dict[str, float] = {}
    for row in rows:
        for hardware, floor in zip(HARDWARE, floor_ms(row), strict=True):
            if hardware.name in row.environment.device and floor:
                found[row.mode] = floor
    return " / ".join(f"{found[mode]:.3g}" for mode in MODES if mode in found)


def steps(rows: Sequence[ResultRow]) -> list[str]:
    """Training steps: rates, memory, and the ratios to the eager baseline and the dense floor."""
    heads = ["device", "commit", "preset", "dtype", "provider", "ms", "tokens/s", "MFU", "peak GB"]
    lines = []
    for row in rows:
        get = row.metrics.get
        over = [get(f"over_{name}") or _over(row, name, rows) for name in ("reference", "dense_lora")]
        rate, mfu = get("segment_tokens_per_s"), get("mfu")
        note = f" ({row.status})" if row.status in TIMED and row.status != "ok" else ""
        names = (device_name(row.environment), row.environment.commit, row.shape.removeprefix("preset="), row.dtype)
        numbers = [_number(rate), "" if mfu is None else f"{mfu:.1%}", _number(row.peak_bytes, 1e9)]
        lines.append([*names, row.provider + note, time_text(row), *numbers, *map(_number, over)])
    return _markdown([*heads, "x reference", "x dense_lora"], lines)


def _over(row: ResultRow, provider: str, rows: Sequence[ResultRow]) -> float | None:
    """The ratio of the medians, for providers that ran one after the other rather than taking turns in one run."""
    same = [
        r for r in rows if (r.case, r.environment.commit, r.provider) == (row.case, row.environment.commit, provider)
    ]
    return row.p50_ms / same[-1].p50_ms if row.p50_ms and same and same[-1].p50_ms and same[-1] != row else None


def time_text(row: ResultRow) -> str:
    """The median, or why there is none."""
    if row.p50_ms is not None:
        return f"{row.p50_ms:.4g}"
    return f"{row.status}: {row.detail}".replace("|", "/") if row.detail else row.status


def _number(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.4g}"


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)]


# The full tables


def to_csv(rows: Sequence[ResultRow]) -> str:
    """Everything in the rows except the parts of a step, with four digits."""
    file = io.StringIO()
    flat = [{**row.to_dict(), "metrics": _metrics_text(row)} for row in rows]
    writer = csv.DictWriter(file, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    for values in flat:
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()})
    return file.getvalue()


def _metrics_text(row: ResultRow) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in row.metrics.items() if not name.startswith("parts_s."))


# Plots: a roofline of the operations, time by provider, and cost by context length

MARKERS = "osD^vP*X<>"


def draw(rows: Sequence[ResultRow], folder: Path) -> list[Path]:
    """The plots of each device, as small SVG files named `<gpu or cpu>-<device>-<what>.svg`; none without rows."""
    files = []
    timed = [row for row in rows if row.status in TIMED or row.kernel == "ceiling"]
    devices = dict.fromkeys((row.environment.kind, row.environment.folder, row.environment.threads) for row in timed)
    for kind, device, threads in devices:
        chosen = [row for row in timed if (row.environment.folder, row.environment.threads) == (device, threads)]
        name = f"{kind}-{device}" + (f"-{threads}-threads" if kind == "cpu" else "")
        for what, plot in (("roofline", roofline), ("providers", by_provider), ("context", by_length)):
            figure = plot(chosen)
            if figure is not None:
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / f"{name}-{what}.svg"
                figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
                files.append(file)
    return files


def _axes() -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rc("svg", hashsalt="gakernels", fonttype="none")
    mpl.rc("font", size=8)
    figure = Figure(figsize=(7, 4), dpi=100)
    return figure, figure.subplots()


def title(rows: Sequence[ResultRow]) -> str:
    """Device, version and commits."""
    where = rows[0].environment
    commits = ", ".join(dict.fromkeys(row.environment.commit for row in rows))
    threads = "" if where.kind == "gpu" else f", {where.threads} thread(s)"
    return f"{where.device}{threads}, torch {where.torch}, commit {commits}"


def roofline(rows: Sequence[ResultRow]) -> Any:
    """Achieved FLOP/s over operations per byte, with the measured ceilings."""
    points = [row for row in rows if row.kernel in OPERATIONS and row.flops and row.bytes and row.p50_ms]
    if not points:
        return None
    figure, axes = _axes()
    for marker, provider in zip(MARKERS, dict.fromkeys(row.provider for row in points), strict=False):
        own = [row for row in points if row.provider == provider]
        x, y = [row.flops / row.bytes for row in own if row.flops and row.bytes], [_rate(row) for row in own]
        axes.scatter(x, y, marker=marker, s=18, label=provider)
    intensities = [row.flops / row.bytes for row in points if row.flops and row.bytes]
    low, high = min(intensities) / 2, max(intensities) * 2
    copy = next((row.metrics["bytes_per_s"] for row in rows if row.kernel == "ceiling" and row.mode == "copy"), None)
    for row in rows:
        if row.kernel == "ceiling" and row.mode == "gemm":
            rate = row.metrics["flops_per_s"]
            line = [min(rate, copy * x) if copy else rate for x in (low, rate / copy if copy else low, high)]
            axes.plot([low, rate / copy if copy else low, high], line, lw=0.8, label=f"ceiling, {row.dtype}")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="FLOP/s", title=title(points))
    axes.legend(fontsize=6)
    return figure


def _rate(row: ResultRow) -> float:
    assert row.flops
    assert row.p50_ms
    return row.flops / (row.p50_ms * 1e-3)


def by_provider(rows: Sequence[ResultRow]) -> Any:
    """Throughput (calls per second) of each provider, over that of `eager` or `reference` in the same case."""
    points = [row for row in rows if row.kernel in OPERATIONS and row.p50_ms]
    if not points:
        return None
    cases = dict.fromkeys(row.case for row in points)
    providers = list(dict.fromkeys(row.provider for row in points))
    figure, axes = _axes()
    width = 0.8 / len(providers)
    for number, provider in enumerate(providers):
        found = {row.case: row.p50_ms for row in points if row.provider == provider and row.p50_ms}
        heights = [_base(points, case) / found[case] if case in found else 0.0 for case in cases]
        axes.bar([index + number * width for index in range(len(cases))], heights, width, label=provider)
    axes.axhline(1, color="black", lw=0.6)
    labels = ["\n".join([kernel, mode, *shape.split()]) for kernel, mode, shape, _ in cases]
    axes.set_xticks([index + 0.4 for index in range(len(cases))], labels, fontsize=5)
    axes.set(ylabel="throughput, eager = 1", title=title(points))
    axes.legend(fontsize=6)
    return figure


def _base(points: Sequence[ResultRow], case: tuple[str, str, str, str]) -> float:
    times = {row.provider: row.p50_ms for row in points if row.case == case and row.p50_ms}
    return times.get("eager") or times.get("reference") or next(iter(times.values()))


def by_length(rows: Sequence[ResultRow]) -> Any:
    """Seconds to read a context, against its tokens."""
    points = [row for row in rows if row.kernel == "contextualisation" and row.p50_ms]
    if not points:
        return None
    figure, axes = _axes()
    for provider in dict.fromkeys(row.provider for row in points):
        own = sorted((tokens(row), row.p50_ms * 1e-3) for row in points if row.provider == provider and row.p50_ms)
        axes.plot([x for x, _ in own], [y for _, y in own], marker="o", ms=3, lw=1, label=provider)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="seconds", title=title(points))
    axes.legend(fontsize=6)
    return figure


def tokens(row: ResultRow) -> int:
    """The context length from the shape."""
    return int(row.shape.split()[0].removeprefix("tokens="))


if __name__ == "__main__":
    raise SystemExit(main())
