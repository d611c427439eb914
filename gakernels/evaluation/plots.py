"""Plots of a report, and of costs against the length of the context, as SVG (extra `plots`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Any

from gakernels.evaluation import paper
from gakernels.evaluation.tables import FRACTION, NOTHING, cell_name

Value = Callable[[Mapping[str, Any]], float | None]

COUNTED: dict[str, Value] = {
    "operations to read the context": lambda row: row["contextualization_flops"]["total"],
    "operations of a question": lambda row: row["query_flops"]["total"],
    "bytes kept": lambda row: row["storage"]["bytes"],
}
MEASURED: dict[str, Value] = {
    "seconds to read the context": lambda row: _read_seconds(row["contextualization_seconds"]),
    "seconds to the first token": lambda row: row["first_token_seconds"],
    "bytes kept": lambda row: row["stored_bytes"],
}
_LOOKS: dict[Any, Any] = {"svg.hashsalt": "gakernels", "font.size": 9}
_MARKERS = "osD^v<>ph*"
_RECALL_AXES = {
    "facts": "facts about a person",
    "length": "tokens of context",
    "position": "third of the context",
    "distractors": "distractors",
    "overwritten": "facts told again",
    "needle": "tokens around one fact",
}
_PAPER_LINES = ("closed_book", "prompt", "adapter")


def plots(report: Mapping[str, Any]) -> dict[str, str]:
    """SVG texts by name: quality (against length or shots, if there are several), and quality against cost.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    made: dict[str, str] = {}
    with rc_context(_LOOKS):
        for metric in dict.fromkeys(row["metric"] for row in report["results"]):
            rows = [_scaled(row) for row in report["results"] if row["metric"] == metric and not is_detail(row)]
            if report["scenario"] == "recall":
                figure = Figure(figsize=(9, 5.5), layout="constrained")
                draw_recall(figure, rows, 100 * report["settings"]["chance"])
            else:
                figure = Figure(figsize=(8, 4.2), layout="constrained")
                _draw_metric(figure.subplots(), report, metric, rows)
            made[metric] = _svg(figure)
        first = next(iter(made), None)
        if first is not None and report["costs"]:
            figure = Figure(figsize=(8, 4.2), layout="constrained")
            _draw_cost(figure.subplots(), report, first)
            made["cost"] = _svg(figure)
    return made


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

    with rc_context(_LOOKS):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        for axes, (label, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            _draw_lengths(axes, rows, value)
            axes.set_title(label)
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), fontsize=8)
        return _svg(figure)


def _draw_lengths(axes: Any, rows: Sequence[Mapping[str, Any]], value: Value) -> None:
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = [(row["cell"]["length"], found) for row in rows if row["method"] == method and (found := value(row))]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, **_style(number, method, 4))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["cell"]["length"] for row in rows}))
    axes.get_xaxis().set_major_formatter(lambda tick, _: f"{tick / 1024:g}K" if tick >= 1024 else f"{tick:g}")
    axes.set_xlabel("tokens of context")


def _read_seconds(value: float) -> float | None:
    """None where nothing is read."""
    return value if value >= NOTHING else None


def is_detail(row: Mapping[str, Any]) -> bool:
    """Whether a row is about a part of another one; such rows are in the tables alone."""
    return not {"task", "category"}.isdisjoint(row["cell"])


def _scaled(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it is shown: fractions in percent."""
    factor = 100 if row["unit"] == FRACTION else 1
    return {**row, **{key: factor * row[key] for key in ("value", "low", "high") if row[key] is not None}}


def _axis(row: Mapping[str, Any]) -> str:
    return row["metric"].replace("_", " ") + (" (%)" if row["unit"] == FRACTION else "")


def _svg(figure: Any) -> str:
    """A figure as SVG, the same text for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw_metric(axes: Any, report: Mapping[str, Any], metric: str, rows: list[dict[str, Any]]) -> None:
    along = next((name for name in ("length", "shots") if _differs(rows, name)), None)
    axes.set_title(f"{report['scenario']}, protocol {report['protocol']}: {metric.replace('_', ' ')}")
    if along is None:
        _bars(axes, rows)
        return
    lines = _lines(rows, along)
    for number, (name, line) in enumerate(lines.items()):
        beside = 2 ** (0.03 * (number - len(lines) / 2))  # keeps equal values from hiding each other
        x, values = [row["cell"][along] * beside for row in line], [row["value"] for row in line]
        axes.errorbar(x, values, yerr=_errors(line), elinewidth=0.8, capsize=2, **_style(number, name, 5))
    if metric == "f1" and report["paper"] in {part.data for part in paper.TABLE_5}:
        _paper_lines(axes, report["paper"], {row["cell"]["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["cell"][along] for row in rows}))
    axes.get_xaxis().set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel(_axis(rows[0]))
    axes.set_xlabel({"length": "tokens of context", "shots": "demonstrations"}.get(along, along))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _style(number: int, label: str, size: float) -> dict[str, Any]:
    """How the line of this number is drawn, with markers of this size."""
    marker = _MARKERS[number % len(_MARKERS)]
    return {"color": f"C{number % 10}", "marker": marker, "markersize": size, "label": label, "linewidth": 1}


def _differs(rows: list[dict[str, Any]], name: str) -> bool:
    return len({row["cell"].get(name) for row in rows}) > 1


def _lines(rows: list[dict[str, Any]], along: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each line: by method and whatever else distinguishes cells."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        rest = tuple((name, value) for name, value in row["cell"].items() if name != along)
        lines.setdefault(row["method"] + (f" ({cell_name(rest)})" if rest else ""), []).append(row)
    return {name: sorted(line, key=lambda row: row["cell"][along]) for name, line in lines.items()}


def _paper_lines(axes: Any, data: str, lengths: set[int]) -> None:
    """The paper's F1 for Mistral-7B-Instruct, dotted."""
    part = next(part for part in paper.TABLE_5 if part.data == data)
    shown = [length for length in paper.LENGTHS if length in lengths]
    for number, method in enumerate(_PAPER_LINES):
        values = [part.values(length)[method] for length in shown]
        axes.plot(shown, values, ":x", color=f"{0.2 + 0.25 * number}", label=f"paper, {part.model}: {method}")


def _bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    labels = [
        row["method"] + (f"\n{cell_name(tuple(row['cell'].items()))}" if _cells(rows) > 1 else "") for row in rows
    ]
    values = [row["value"] for row in rows]
    axes.barh(range(len(rows)), values, xerr=_errors(rows), color="C0", alpha=0.8, height=0.6, ecolor="0.3")
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(_axis(rows[0]))
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 50 * min(positive):
        axes.set_xscale("log")


def _errors(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The distances from each value to the lower and upper end of its interval; not a number if it has none."""
    return [[nan if row[key] is None else abs(row["value"] - row[key]) for row in rows] for key in ("low", "high")]


def _cells(rows: list[dict[str, Any]]) -> int:
    return len({tuple(row["cell"].items()) for row in rows})


def _draw_cost(axes: Any, report: Mapping[str, Any], metric: str) -> None:
    """Quality against the operations of a question, one point per method and cell."""
    quality: dict[tuple[str, str], float] = {}
    rows = [_scaled(row) for row in report["results"] if row["metric"] == metric]
    for row in rows:
        if not is_detail(row):
            cell = {name: value for name, value in row["cell"].items() if name != "kind"}
            quality.setdefault((row["method"], cell_name(tuple(cell.items()))), row["value"])
    methods = list(dict.fromkeys(row["method"] for row in report["costs"]))
    for number, method in enumerate(methods):
        points = [
            (row["query_flops"]["total"], quality[key])
            for row in report["costs"]
            if row["method"] == method and (key := (method, cell_name(tuple(row["cell"].items())))) in quality
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, linestyle="", alpha=0.7, **_style(number, method, 6))
    axes.set_xscale("log")
    axes.set_xlabel("operations of a question (FLOP, from the shapes)")
    axes.set_ylabel(_axis(rows[0]))
    axes.set_title("quality against the cost of a question")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


def draw_recall(figure: Any, rows: Sequence[Mapping[str, Any]], chance: float) -> None:
    """Draw one metric of recall, values and chance in percent: a panel for each test, a line for each method, chance
    dotted."""
    tests = list(dict.fromkeys(name for row in rows for name in row["cell"]))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    across = min(3, len(tests))
    panels = figure.subplots(-(-len(tests) // across), across, squeeze=False, sharey=True).flat
    for test, axes in zip(tests, panels, strict=False):
        values = list(dict.fromkeys(row["cell"][test] for row in rows if test in row["cell"]))
        for number, method in enumerate(methods):
            line = {row["cell"][test]: row for row in rows if row["method"] == method and test in row["cell"]}
            places = [place + 0.05 * (number - len(methods) / 2) for place, value in enumerate(values) if value in line]
            shown = [line[value] for value in values if value in line]
            axes.errorbar(places, [row["value"] for row in shown], yerr=_errors(shown), **_style(number, method, 4))
        axes.axhline(chance, color="0.5", linestyle=":", linewidth=1)
        axes.set_xticks(range(len(values)), [f"{value:,}" if isinstance(value, int) else value for value in values])
        axes.set_xlabel(_RECALL_AXES.get(test, test))
        axes.set_ylim(-3, 103)
    for axes in list(panels)[len(tests) :]:
        axes.set_visible(False)
    figure.supylabel(_axis(rows[0]))
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(methods), fontsize=8
    )
