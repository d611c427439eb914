"""Plots of the rows: a roofline of the operations, time by provider, and cost by context length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
mpl.rcParams.update(
    {"svg.hashsalt": "gakernels", "svg.fonttype": "none", "font.size": 8, "figure.figsize": (7, 4), "figure.dpi": 100}
)

import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.rows import TIMED, Row  # noqa: E402

OPERATIONS = ("context_state", "low_rank_polar", "lowrank_linear")
MARKERS = "osD^vP*X<>"


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
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
                plt.close(figure)
                files.append(file)
    return files


def title(rows: Sequence[Row]) -> str:
    """Device, version and commits."""
    where = rows[0].environment
    commits = ", ".join(dict.fromkeys(row.environment.commit for row in rows))
    threads = "" if where.kind == "gpu" else f", {where.threads} thread(s)"
    return f"{where.device}{threads}, torch {where.torch}, commit {commits}"


def roofline(rows: Sequence[Row]) -> Any:
    """Achieved FLOP/s over operations per byte, with the measured ceilings."""
    points = [row for row in rows if row.kernel in OPERATIONS and row.flops and row.bytes and row.p50_ms]
    if not points:
        return None
    figure, axes = plt.subplots()
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


def _rate(row: Row) -> float:
    assert row.flops
    assert row.p50_ms
    return row.flops / (row.p50_ms * 1e-3)


def by_provider(rows: Sequence[Row]) -> Any:
    """Throughput (calls a second) of each provider, over that of `eager` or `reference` in the same case."""
    points = [row for row in rows if row.kernel in OPERATIONS and row.p50_ms]
    if not points:
        return None
    cases = dict.fromkeys(row.case for row in points)
    providers = list(dict.fromkeys(row.provider for row in points))
    figure, axes = plt.subplots()
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


def _base(points: Sequence[Row], case: tuple[str, str, str, str]) -> float:
    times = {row.provider: row.p50_ms for row in points if row.case == case and row.p50_ms}
    return times.get("eager") or times.get("reference") or next(iter(times.values()))


def by_length(rows: Sequence[Row]) -> Any:
    """Seconds to read a context, over its tokens."""
    points = [row for row in rows if row.kernel == "contextualisation" and row.p50_ms]
    if not points:
        return None
    figure, axes = plt.subplots()
    for provider in dict.fromkeys(row.provider for row in points):
        own = sorted((tokens(row), row.p50_ms * 1e-3) for row in points if row.provider == provider and row.p50_ms)
        axes.plot([x for x, _ in own], [y for _, y in own], marker="o", ms=3, lw=1, label=provider)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="seconds", title=title(points))
    axes.legend(fontsize=6)
    return figure


def tokens(row: Row) -> int:
    """The context length that stands in the shape."""
    return int(row.shape.split()[0].removeprefix("tokens="))
