"""The page of a published table: the reports of its rows put together, as Markdown, CSV, JSON, HTML and plots."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gakernels.cost.shapes import ModelShape
from gakernels.evaluation.cost import method_cost
from gakernels.evaluation.paper import LENGTHS
from gakernels.evaluation.plots import COUNTED as COUNTED_PANELS
from gakernels.evaluation.plots import MEASURED as MEASURED_PANELS
from gakernels.evaluation.plots import costs_by_length, is_detail, plots
from gakernels.evaluation.published import FROM_SHAPES, Published, Row, Table
from gakernels.evaluation.report import data_digests, describe_model, describe_run, versions_and_device, write_page
from gakernels.evaluation.tables import FRACTION, REFERENCE, ReportTable, interval_text, tables
from gakernels.model import GenerativeAdapter

KIND = "gakernels reproduction"
COUNTED = ("closed_book", "prompt", "prompt_cached", "adapter", "adapter_merged", "full_tuning")
RULE = (
    "Published values stand only beside the same data, split and protocol: with --paper-data, --protocol released and "
    "nothing that changes what is asked. Models and training are their authors'."
)


@dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Attributes:
        row: the row.
        arguments: of the `gakernels eval` that is the row; none for costs from shapes.
        report: of the row; None if it was not run.
        reason: why not.
    """

    row: Row
    arguments: tuple[str, ...]
    report: Mapping[str, Any] | None = None
    reason: str = ""

    @property
    def published(self) -> tuple[Published, ...]:
        """The published values that may stand beside ours."""
        return self.row.published if self.report is not None and self.report["paper"] is not None else ()


def shapes_report(model: GenerativeAdapter) -> dict[str, Any]:
    """Costs at the paper's lengths, in the form of a report.

    Raises:
        InputError: the formulas do not cover the model.
    """
    shape = ModelShape.from_config(model.base.config)
    costs = [
        {
            **method_cost(name, shape, model.config, length).to_dict(),
            "cell": {"length": length},
            "context_tokens": length,
        }
        for length in LENGTHS
        for name in COUNTED
    ]
    empty: dict[str, Any] = {name: [] for name in ("results", "comparisons", "methods", "measured_costs", "notes")}
    settings = {"data": {}, **describe_model(model)}
    rest: dict[str, Any] = {"paper": None, "skipped": {"counts": {}, "first": {}}, "settings": settings}
    return {**empty, **rest, "costs": costs, **describe_run(model)}


def merge(name: str, table: Table, outcomes: Sequence[Outcome], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The report of the whole table, in JSON types.

    Args:
        name: of the table.
        table: its description.
        outcomes: of its rows.
        settings: of the run: `protocol`, `limit` and `generator`.
    """
    done = [(outcome.row, outcome.report) for outcome in outcomes if outcome.report is not None]
    lists = {
        key: [_labelled(row, entry) for row, report in done for entry in report[key]]
        for key in ("results", "comparisons", "costs", "measured_costs")
    }
    return {
        "kind": KIND,
        "table": name,
        "title": table.title,
        "does": table.does,
        **settings,
        "rows": [
            {"row": outcome.row.name, "command": shlex.join(outcome.arguments), "reason": outcome.reason}
            for outcome in outcomes
        ],
        **lists,
        # Tuned rows have no adapter to compare with.
        "comparisons": [entry for entry in lists["comparisons"] if entry["method"] == REFERENCE],
        "methods": [
            {**run, "method": f"{row.name}: {run['method']}"} for row, report in done for run in report["methods"]
        ],
        "published": [
            {"row": outcome.row.name, **asdict(value)} for outcome in outcomes for value in outcome.published
        ],
        "papers": {outcome.row.labels["data"]: outcome.row.paper_data for outcome in outcomes if outcome.published},
        "skipped": _skipped(report["skipped"] for _, report in done),
        "notes": list(dict.fromkeys(note for _, report in done for note in report["notes"])),
        "paper": None,
        "data": {name: digest for _, report in done for name, digest in report["settings"]["data"].items()},
        "fingerprints": sorted({report["settings"]["base_fingerprint"] for _, report in done}),
        **{key: done[0][1][key] if done else "" for key in ("model", "versions", "device")},
    }


def _labelled(row: Row, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry, "row": row.name, "cell": {**row.labels, **entry["cell"]}}


def _skipped(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows about the same data have left out the same records, which count once."""
    counts: dict[str, int] = {}
    first: dict[str, str] = {}
    for part in {json.dumps(part): part for part in parts}.values():
        for reason, count in part["counts"].items():
            counts[reason] = counts.get(reason, 0) + count
            first.setdefault(reason, part["first"][reason])
    return {"counts": counts, "first": first}


# Tables


def main_table(report: Mapping[str, Any], metrics: Sequence[str]) -> ReportTable:
    """One line for each row and method, with the published values beside ours."""
    shown = [entry for entry in report["results"] if entry["metric"] in metrics and not is_detail(entry)]
    sources = list(dict.fromkeys(value["source"] for value in report["published"]))
    ours = {(entry["row"], entry["method"], entry["metric"]): entry for entry in shown}
    theirs = {
        (each["row"], each["method"], each["metric"], each["source"]): each["value"] for each in report["published"]
    }
    lines = []
    for name in (row["row"] for row in report["rows"]):
        methods = [entry["method"] for entry in (*shown, *report["published"]) if entry["row"] == name]
        for method in dict.fromkeys(methods):
            values = [interval_text(ours.get((name, method, metric))) for metric in metrics]
            beside = [
                "-" if (value := theirs.get((name, method, metric, source))) is None else f"{value:.{_digits(metric)}f}"
                for source in sources
                for metric in metrics
            ]
            lines.append((name, method, *values, *beside))
    headings = [_heading(metric) for metric in metrics]
    beside_headings = [
        source if len(metrics) == 1 else f"{source}: {heading}" for source in sources for heading in headings
    ]
    return ReportTable(report["title"], ("", "method", *headings, *beside_headings), tuple(lines), RULE)


def _digits(metric: str) -> int:
    return 2 if metric.endswith("perplexity") else 1


def _heading(metric: str) -> str:
    return metric.replace("_", " ") + ("" if metric.endswith("perplexity") else " (%)")


def _all_tables(report: Mapping[str, Any], metrics: Sequence[str]) -> list[ReportTable]:
    missing = tuple((row["row"], row["reason"]) for row in report["rows"] if row["reason"])
    commands = tuple((row["row"], row["command"]) for row in report["rows"] if row["command"])
    found = [
        main_table(report, metrics),
        ReportTable("Rows without results", ("", "why"), missing),
        *tables(report),
        ReportTable("Commands", ("", "gakernels eval"), commands, "Each row by itself."),
    ]
    return [table for table in found if table.rows]


def _facts(report: Mapping[str, Any]) -> list[str]:
    limit = report["limit"]
    ran = sum(not row["reason"] for row in report["rows"])
    tried = f"Only tried: --limit {limit} leaves at most {limit} questions or documents to a row."
    facts = [
        report["does"],
        *([tried] if limit else []),
        f"{ran} of {len(report['rows'])} rows have results; protocol {report['protocol']}",
    ]
    if not ran:
        return facts
    data = data_digests(report["data"])
    return [
        *facts,
        f"generator {report['generator']}; base model {report['model'] or 'without a name'}, fingerprint "
        + " and ".join(report["fingerprints"]),
        f"data {data}" if data else "no data files",
        versions_and_device(report),
        *report["notes"],
    ]


# CSV


COLUMNS = (
    *("row", "cell", "method", "source", "metric", "unit"),
    *("value", "low", "high", "count", "clusters", "resampled"),
)
_MEASURED = {
    "contextualization_seconds": "seconds",
    "stored_bytes": "bytes",
    "first_token_seconds": "seconds",
    "tokens_per_second": "tokens a second",
}


def values(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All values of the report, one dictionary each, with the keys `COLUMNS` as far as they apply."""
    for entry in report["results"]:
        yield {**{key: entry.get(key) for key in COLUMNS}, "source": "measured"}
    for each in report["published"]:
        yield {**each, "unit": "perplexity" if each["metric"].endswith("perplexity") else "percent"}
    for entry in report["measured_costs"]:
        for metric, unit in _MEASURED.items():
            if entry[metric] is not None:
                yield {**_place(entry), "source": "measured", "metric": metric, "unit": unit, "value": entry[metric]}
    for entry in report["costs"]:
        counted = {
            ("contextualization_flops", "operations"): entry["contextualization_flops"]["total"],
            ("query_flops", "operations"): entry["query_flops"]["total"],
            ("stored_numbers", "numbers"): entry["storage"]["numbers"],
        }
        for (metric, unit), value in counted.items():
            yield {**_place(entry), "source": "from shapes", "metric": metric, "unit": unit, "value": value}


def _place(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("row", "cell", "method")}


def csv_text(report: Mapping[str, Any]) -> str:
    """The values as CSV: fractions as percent, cells as `name value, name value`."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for value in values(report):
        writer.writerow(_shown(value))
    return buffer.getvalue()


def _shown(value: Mapping[str, Any]) -> dict[str, Any]:
    shown = {**value, "cell": ", ".join(f"{name} {part}" for name, part in value.get("cell", {}).items())}
    if value["unit"] == FRACTION:
        scaled = {key: None if value[key] is None else 100 * value[key] for key in ("value", "low", "high")}
        return {**shown, **scaled, "unit": "percent"}
    return shown


# Plots and files


def all_plots(report: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, str]:
    """SVG texts by name, for each data set of the table: those of an evaluation, or without metrics costs by length.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not metrics:
        counted = [row for row in report["costs"] if row["cell"]["data"] == FROM_SHAPES]
        parts = {"counted": (counted, COUNTED_PANELS), "measured": (report["measured_costs"], MEASURED_PANELS)}
        return {name: costs_by_length(rows, panels) for name, (rows, panels) in parts.items() if rows}
    made: dict[str, str] = {}
    shown = {"results": [row for row in report["results"] if row["metric"] in metrics], "costs": report["costs"]}
    for data in dict.fromkeys(row["cell"]["data"] for row in shown["results"]):
        part = {
            key: [{**row, "cell": _without(row["cell"], "data")} for row in rows if row["cell"]["data"] == data]
            for key, rows in shown.items()
        }
        scenario = f"{report['table']}, {data}"
        drawn = plots({**report, **part, "scenario": scenario, "paper": report["papers"].get(data)})
        made |= {f"{slug(data)}.{name}": text for name, text in drawn.items()}
    return made


def _without(cell: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in cell.items() if key != name}


def slug(text: str) -> str:
    """A text as part of the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace(",", "")).strip("-")


def write(report: Mapping[str, Any], table: Table, path: Path, drawn: Mapping[str, str]) -> list[Path]:
    """Write the JSON, and Markdown, CSV, HTML and plots (SVG texts by name) next to it.

    Returns:
        The files.

    Raises:
        OSError, InputError: see `files.write_text`.
    """
    title = report["title"] + (f" (tried with --limit {report['limit']})" if report["limit"] else "")
    page = title, _facts(report), _all_tables(report, table.metrics)
    return write_page(report, path, page, drawn, {path.with_suffix(".csv"): csv_text(report)})
