"""Markdown tables of the small-scale study."""

from collections.abc import Mapping, Sequence
from typing import Any

from gakernels.evaluation.report import cell_name
from gakernels.evaluation.tables import ReportTable, short_count, short_seconds
from studies.small_scale_plots import PANELS

Row = Mapping[str, Any]


def tables(parts: Mapping[str, Any]) -> list[ReportTable]:
    """All tables of what is there."""
    found = []
    for name, part in parts.items():
        if name.startswith("ablation"):
            found += [_ablation(name, part["rows"]), _compared(name, part["comparisons"])]
        else:
            found += [_recall(name, metric, part["results"]) for metric in _different(part["results"], "metric")]
        if name.startswith("length"):
            found.append(_costs(name, part))
    return found


def _different(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _ablation(name: str, rows: Sequence[Row]) -> ReportTable:
    lines = [
        (f"{variant}: {method}", *(_panel(rows, panel, variant=variant, method=method) for panel in PANELS))
        for variant in _different(rows, "variant")
        for method in _different(rows, "method")
        if any((row["variant"], row["method"]) == (variant, method) for row in rows)
    ]
    return ReportTable(name, ("", *(title for *_, title in PANELS)), tuple(lines))


def _compared(name: str, rows: Sequence[Row]) -> ReportTable:
    lines = [
        (f"{variant} against {other}", *(_panel(rows, panel, variant=variant, against=other) for panel in PANELS))
        for variant in _different(rows, "variant")
        for other in _different(rows, "against")
        if any((row["variant"], row["against"]) == (variant, other) for row in rows)
    ]
    note = "Paired, on the same texts: ratios of perplexities, differences of recall."
    return ReportTable(f"{name}, compared", ("", *(title for *_, title in PANELS)), tuple(lines), note)


def _panel(rows: Sequence[Row], panel: tuple[str, str, str], **keys: str) -> str:
    """The value of a panel of the plot, for a row of the table."""
    scenario, metric, _ = panel
    wanted = {"scenario": scenario, "metric": metric, **keys}
    found = next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)
    return _value(found, 1 if metric == "accuracy" else 3)


def _value(row: Row | None, digits: int) -> str:
    if row is None:
        return "-"
    factor, unit = (100, "%") if digits == 1 else (1, "")
    value, low, high = (factor * row[key] for key in ("value", "low", "high"))
    return f"{value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def _recall(name: str, metric: str, results: Sequence[Row]) -> ReportTable:
    methods = _different(results, "method")
    cells = list(dict.fromkeys(tuple(row["cell"].items()) for row in results if row["metric"] == metric))
    by_key = {(row["metric"], tuple(row["cell"].items()), row["method"]): row for row in results}
    lines = [
        (cell_name(cell), *(_value(by_key.get((metric, cell, method)), 1) for method in methods)) for cell in cells
    ]
    return ReportTable(f"{name}: {metric.replace('_', ' ')}", ("", *methods), tuple(lines))


def _costs(name: str, part: Mapping[str, Any]) -> ReportTable:
    """The cost of the longest context of each method, by shapes, and the time that was measured."""
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
