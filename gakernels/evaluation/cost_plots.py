"""Plots of costs against the length of the context, as SVG (extra `plots`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gakernels.evaluation.plots import MARKERS, svg
from gakernels.evaluation.tables import NOTHING

Value = Callable[[Mapping[str, Any]], float | None]

COUNTED: dict[str, Value] = {
    "operations to read the context": lambda row: row["contextualization_flops"]["total"],
    "operations of a question": lambda row: row["query_flops"]["total"],
    "bytes kept": lambda row: row["storage"]["bytes"],
}
MEASURED: dict[str, Value] = {
    "seconds to read the context": lambda row: _seconds(row["contextualization_seconds"]),
    "seconds to the first token": lambda row: row["first_token_seconds"],
    "bytes kept": lambda row: row["stored_bytes"],
}


def _seconds(value: float) -> float | None:
    """None where nothing is read."""
    return value if value >= NOTHING else None


def costs_by_length(rows: Sequence[Mapping[str, Any]], panels: Mapping[str, Value]) -> str:
    """One panel for each quantity, a line for each method; zeros are left out, since the axes are logarithmic.

    Args:
        rows: costs of a report, whose cells have a `length`.
        panels: what to draw, by label: `COUNTED` or `MEASURED`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "gakernels", "font.size": 9}):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        for axes, (label, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            _draw(axes, rows, value)
            axes.set_title(label)
        handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
        for axes in figure.axes[1:]:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), fontsize=8)
        return svg(figure)


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]], value: Value) -> None:
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = [(row["cell"]["length"], found) for row in rows if row["method"] == method and (found := value(row))]
        if points:
            x, y = zip(*points, strict=True)
            style = {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
            axes.plot(x, y, label=method, linewidth=1, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["cell"]["length"] for row in rows}))
    axes.get_xaxis().set_major_formatter(lambda tick, _: f"{tick / 1024:g}K" if tick >= 1024 else f"{tick:g}")
    axes.set_xlabel("tokens of context")
