"""Plots and tables of the small-scale study: the ablation, recall against context length, and recall against cost."""

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
mpl.rcParams.update({"svg.hashsalt": "gakernels", "svg.fonttype": "none", "font.size": 8, "figure.dpi": 100})

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from gakernels.evaluation.tables import ReportTable, cell_name, short_count, short_seconds  # noqa: E402

StudyRow = Mapping[str, Any]

PANELS = (
    ("perplexity", "reconstruction_perplexity", "reconstruction perplexity"),
    ("perplexity", "completion_perplexity", "completion perplexity"),
    ("recall question", "accuracy", "recall, asked"),
    ("recall statement", "accuracy", "recall, sentence to end"),
)
BASELINES = {"closed_book": "closed-book", "prompt": "prompt", "static_lora": "static LoRA"}
MARKERS = "osD^v<>"


def draw(parts: Mapping[str, Any], folder: Path) -> list[Path]:
    """The plots of the finished parts, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    ablations = [part for name, part in parts.items() if name.startswith("ablation")]
    by_length = {name.removeprefix("length "): part for name, part in parts.items() if name.startswith("length")}
    for name, figure in (("ablation", draw_ablation(ablations)), ("recall", draw_recall(by_length))):
        files.append(folder / f"small-scale-{name}.svg")
        figure.savefig(files[-1], metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return files


def draw_ablation(ablations: list[Mapping[str, Any]]) -> Any:
    """A panel per metric, a row per variant, a mark per seed."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10, 3), sharey=True, layout="constrained")
    rows = ablations[0]["rows"]
    labels = list(dict.fromkeys(_label(row) for row in rows if row["method"] != "other_adapter"))
    for axes, (scenario, metric, title) in zip(panels, PANELS, strict=True):
        for number, ablation in enumerate(ablations):
            for row in ablation["rows"]:
                if (row["scenario"], row["metric"]) == (scenario, metric) and _label(row) in labels:
                    _mark(axes, row, labels.index(_label(row)) + 0.2 * number, number)
        axes.set_title(title, fontsize=8)
        axes.grid(axis="x", linewidth=0.3)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    return figure


def _label(row: Mapping[str, Any]) -> str:
    if row["method"] == "adapter":
        return str(row["variant"]).replace("_", " ")
    return BASELINES.get(row["method"], row["method"])


def _errors(rows: Sequence[StudyRow]) -> list[list[float]]:
    """The distances from each value to the ends of its interval; not a number if it has none."""
    return [[nan if row[key] is None else abs(row["value"] - row[key]) for row in rows] for key in ("low", "high")]


def _mark(axes: Axes, row: Mapping[str, Any], place: float, seed: int) -> None:
    errors = _errors([row])
    axes.errorbar([row["value"]], [place], xerr=errors, fmt=MARKERS[seed], color=f"C{seed}", markersize=4, linewidth=1)


def draw_recall(by_length: Mapping[str, Mapping[str, Any]]) -> Any:
    """Recall against the length of the context, and against the operations for reading it and asking one question."""
    figure, grid = plt.subplots(
        len(by_length), 2, figsize=(10, 3 * len(by_length)), squeeze=False, layout="constrained"
    )
    for (name, part), (left, right) in zip(by_length.items(), grid, strict=True):
        methods = list(dict.fromkeys(row["method"] for row in part["results"]))
        cost = {(row["method"], row["cell"]["length"]): _operations(row) for row in part["costs"]}
        for number, method in enumerate(methods):
            rows = [row for row in part["results"] if row["method"] == method]
            values = [row["value"] for row in rows]
            tokens = [row["cell"]["length"] * 2 ** (0.03 * (number - len(methods) / 2)) for row in rows]
            style = {"color": f"C{number}", "marker": MARKERS[number], "markersize": 4, "linewidth": 1}
            left.errorbar(tokens, values, yerr=_errors(rows), label=method.replace("_", " "), **style)
            right.plot([cost[method, row["cell"]["length"]] for row in rows], values, **style)
        left.set_xscale("log", base=2)
        left.set_xticks(lengths := sorted({row["cell"]["length"] for row in part["results"]}), map(str, lengths))
        left.set_xlabel("tokens of context, 8 facts asked for")
        left.set_ylabel(f"recall ({name} generator)")
        right.set_xscale("log")
        right.set_xlabel("operations: the context once and one question (FLOP)")
        right.legend(*left.get_legend_handles_labels(), fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _operations(row: Mapping[str, Any]) -> float:
    return float(row["contextualization_flops"]["total"] + row["query_flops"]["total"])


# Tables, in Markdown


def tables(parts: Mapping[str, Any]) -> list[ReportTable]:
    """All tables of the finished parts."""
    found = []
    for name, part in parts.items():
        if name.startswith("ablation"):
            found += [_ablation(name, part["rows"]), _compared(name, part["comparisons"])]
        else:
            found += [_recall(name, metric, part["results"]) for metric in _different(part["results"], "metric")]
        if name.startswith("length"):
            found.append(_costs(name, part))
    return found


def _different(rows: Sequence[StudyRow], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _ablation(name: str, rows: Sequence[StudyRow]) -> ReportTable:
    lines = [
        (f"{variant}: {method}", *(_panel(rows, panel, variant=variant, method=method) for panel in PANELS))
        for variant in _different(rows, "variant")
        for method in _different(rows, "method")
        if any((row["variant"], row["method"]) == (variant, method) for row in rows)
    ]
    return ReportTable(name, ("", *(title for *_, title in PANELS)), tuple(lines))


def _compared(name: str, rows: Sequence[StudyRow]) -> ReportTable:
    lines = [
        (f"{variant} against {other}", *(_panel(rows, panel, variant=variant, against=other) for panel in PANELS))
        for variant in _different(rows, "variant")
        for other in _different(rows, "against")
        if any((row["variant"], row["against"]) == (variant, other) for row in rows)
    ]
    note = "Paired, on the same texts: ratios of perplexities, differences of recall."
    return ReportTable(f"{name}, compared", ("", *(title for *_, title in PANELS)), tuple(lines), note)


def _panel(rows: Sequence[StudyRow], panel: tuple[str, str, str], **keys: str) -> str:
    """The value of a plot panel for a row of the table."""
    scenario, metric, _ = panel
    wanted = {"scenario": scenario, "metric": metric, **keys}
    found = next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)
    return _value(found, 1 if metric == "accuracy" else 3)


def _value(row: StudyRow | None, digits: int) -> str:
    if row is None:
        return "-"
    factor, unit = (100, "%") if digits == 1 else (1, "")
    if row["low"] is None:
        return f"{factor * row['value']:.{digits}f}{unit}"
    value, low, high = (factor * row[key] for key in ("value", "low", "high"))
    return f"{value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def _recall(name: str, metric: str, results: Sequence[StudyRow]) -> ReportTable:
    methods = _different(results, "method")
    cells = list(dict.fromkeys(tuple(row["cell"].items()) for row in results if row["metric"] == metric))
    by_key = {(row["metric"], tuple(row["cell"].items()), row["method"]): row for row in results}
    lines = [
        (cell_name(cell), *(_value(by_key.get((metric, cell, method)), 1) for method in methods)) for cell in cells
    ]
    return ReportTable(f"{name}: {metric.replace('_', ' ')}", ("", *methods), tuple(lines))


def _costs(name: str, part: Mapping[str, Any]) -> ReportTable:
    """The cost of the longest context with each method, by shapes, and the measured time."""
    runs = {run["method"]: run for run in part["methods"]}
    costs = {row["method"]: row for row in sorted(part["costs"], key=lambda row: row["context_tokens"])}
    lines = [
        (
            method,
            str(row["context_tokens"]),
            short_count(row["contextualization_flops"]["total"]),
            short_count(row["query_flops"]["total"]),
            short_count(row["storage"]["bytes"]),
            short_seconds(runs[method]["contextualization_seconds"]),
            short_seconds(runs[method]["question_seconds"]),
        )
        for method, row in costs.items()
    ]
    headings = ("", "tokens", "FLOP: the context", "FLOP: a question", "bytes kept", "seconds: a context", "a question")
    return ReportTable(f"{name}: cost", headings, tuple(lines), "FLOP of the longest context; times are means of all.")
