"""The tables of a report, as Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gakernels.evaluation import paper
from gakernels.evaluation.scenarios import Cell

REFERENCE = "adapter"  # the method that others are compared with, if it is there
NOTHING = 1e-4  # seconds; methods that read no context take less
FRACTION = "fraction"  # the unit of what is shown in percent
INTERVALS = (
    "In brackets: 95% bootstrap intervals, resampling the contexts (or tasks, or items) of the last column; exact ones"
    " where all are right or all wrong. Where there is one, there is no interval."
)
Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ReportTable:
    """A table.

    Attributes:
        title: the heading above it.
        headings: of the columns; the first is left-aligned, the others right-aligned.
        rows: cells as shown.
        note: the text below it.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table as Markdown, with a second-level heading."""
        lines = [_line(self.headings), "|---" + "|---:" * (len(self.headings) - 1) + "|", *map(_line, self.rows)]
        parts = [f"## {self.title}", "\n".join(lines), self.note]
        return "\n\n".join(filter(None, parts)) + "\n"

    def html(self) -> str:
        """The table as HTML, with a second-level heading."""
        head = "".join(f"<th>{escape(heading)}</th>" for heading in self.headings)
        body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        note = f"<p>{escape(self.note)}</p>\n" if self.note else ""
        return f"<h2>{escape(self.title)}</h2>\n<table>\n<tr>{head}</tr>\n{body}\n</table>\n{note}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def short_count(count: float) -> str:
    """A count with a metric prefix."""
    prefixes = ("", "k", "M", "G", "T", "P")
    power = min(max(len(str(int(count))) - 1, 0) // 3, len(prefixes) - 1)
    return f"{count / 1000**power:.{3 if power else 0}f} {prefixes[power]}".strip()


def short_seconds(seconds: float | None) -> str:
    """Seconds or milliseconds; a dash for None."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


# Of a report


def tables(report: Mapping[str, Any]) -> list[ReportTable]:
    """All tables of a report: its own results, the paper's, and the cost by shapes."""
    found = [*own_tables(report), *_paper(report), _shape_costs(report)]
    return [table for table in found if table.rows]


def own_tables(report: Mapping[str, Any]) -> list[ReportTable]:
    """Quality, comparisons of methods, measurements, and what was left out."""
    found = [*_quality(report), *_compared(report), _measured_costs(report), _measured(report), _skipped(report)]
    return [table for table in found if table.rows]


def _quality(report: Mapping[str, Any]) -> list[ReportTable]:
    return [
        ReportTable(f"{_name(metric)}{' (%)' if in_percent else ''}", headings, rows, INTERVALS)
        for metric, in_percent, headings, rows in _by_metric(report["results"], "method")
    ]


def _compared(report: Mapping[str, Any]) -> list[ReportTable]:
    made = []
    for metric, in_percent, headings, rows in _by_metric(report["comparisons"], "against"):
        method = report["comparisons"][0]["method"]
        how, better, unit = ("minus", "Above 0", " (%)") if in_percent else ("over", "Below 1", "")
        title = f"{_name(metric)}: {method} {how} the others{unit}"
        note = f"On the same questions, paired. {better}: {method} is better. {INTERVALS}"
        made.append(ReportTable(title, headings, rows, note))
    return made


def _by_metric(results: Sequence[Mapping[str, Any]], key: str) -> Iterator[tuple[str, bool, tuple[str, ...], Rows]]:
    """For each metric: whether it is shown in percent, and a table of its values by cell and method (under a key)."""
    methods = list(dict.fromkeys(row[key] for row in results))
    for metric in dict.fromkeys(row["metric"] for row in results):
        by_cell: dict[Cell, dict[str, Mapping[str, Any]]] = {}
        for row in results:
            if row["metric"] == metric:
                in_percent = row["unit"] == FRACTION
                by_cell.setdefault(tuple(row["cell"].items()), {})[row[key]] = row
        rows = tuple(
            (cell_name(cell), *(interval_text(found.get(method)) for method in methods), _counts(found))
            for cell, found in by_cell.items()
        )
        yield metric, in_percent, ("", *methods, "scored / resampled"), rows


def _name(metric: str) -> str:
    return metric.replace("_", " ")


def cell_name(cell: Cell) -> str:
    """The name of a cell in tables and plots."""
    return ", ".join(f"{name} {value}" for name, value in cell) or "all"


def interval_text(row: Mapping[str, Any] | None) -> str:
    """A value with its interval, or with the number of clusters if it has none: in percent with one digit, or as it is
    with three; a dash for None."""
    if row is None:
        return "-"
    factor, digits = (100, 1) if row["unit"] == FRACTION else (1, 3)
    if row["low"] is None:
        return f"{factor * row['value']:.{digits}f} (n = {row['clusters']})"
    value, low, high = (factor * row[key] for key in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _counts(by_method: Mapping[str, Mapping[str, Any]]) -> str:
    counts = sorted({(row["count"], row["clusters"], row["resampled"]) for row in by_method.values()})
    return "; ".join(f"{count:,} / {clusters:,} {resampled}" for count, clusters, resampled in counts)


def _paper(report: Mapping[str, Any]) -> list[ReportTable]:
    """The paper's values, if the report is about the same data (the caller says so), split and protocol."""
    note = "The paper's models and training; the data, its split and the protocol are those of this report."
    data = report["paper"]
    if data is None:
        return []
    if report["scenario"] == "docqa":
        lengths = {row["cell"]["length"] for row in report["results"]}
        return [_table_5(part, lengths, note) for part in paper.TABLE_5 if part.data == data]
    if report["scenario"] == "dialog":
        rows: Rows = tuple(
            (row.model, f"{paper.TABLE_1_F1[row.model]:.1f}", f"{row.tera_operations:.3f}", row.floats)
            for row in paper.TABLE_1
        )
        title = f"Paper, table 1: Mistral-7B-Instruct, {data}"
        return [ReportTable(title, ("", "F1 (%)", "TFLOPS", "extra storage (M floats)"), rows, note)]
    if report["scenario"] == "perplexity":
        rows = tuple((name, f"{a:.2f}", f"{b:.2f}") for name, (a, b) in paper.TABLE_2.items())
        title = f"Paper, table 2: Mistral-7B-Instruct, {data}"
        return [ReportTable(title, ("", "reconstruction perplexity", "completion perplexity"), rows, note)]
    rows = (("adapter", f"{paper.METAICL_ACCURACY:.1f}"),)
    title = f"Paper, abstract: Mistral-7B-Instruct, {data}"
    return [ReportTable(title, ("", "accuracy (%), mean of 26 tasks"), rows, note)]


def _table_5(part: paper.DocumentQuestions, lengths: set[int], note: str) -> ReportTable:
    methods = ("closed_book", "sft_full", "cpt_full", "prompt", "adapter")
    rows = tuple(
        (f"length {length}", *(f"{part.values(length)[method]:.1f}" for method in methods))
        for length in paper.LENGTHS
        if length in lengths
    )
    return ReportTable(f"Paper, table 5: F1 (%), {part.model}, {part.data}", ("", *methods), rows, note)


def _shape_costs(report: Mapping[str, Any]) -> ReportTable:
    rows = tuple(
        (
            f"{cell_name(tuple(row['cell'].items()))}: {row['method']}",
            f"{row['context_tokens']:,}",
            short_count(row["contextualization_flops"]["total"]),
            short_count(row["query_flops"]["total"]),
            short_count(row["storage"]["numbers"]),
            short_count(row["storage"]["bytes"]),
            row["storage"]["kind"],
        )
        for row in report["costs"]
    )
    headings = ("", "tokens", "FLOP to read the context", "FLOP of a question", "numbers kept", "bytes", "of what")
    note = "From the shapes of the model (docs/evaluation.md), for the mean context and question of a cell."
    return ReportTable("Cost, by shapes", headings, rows, note)


def _measured_costs(report: Mapping[str, Any]) -> ReportTable:
    rows = tuple(
        (
            f"{cell_name(tuple(row['cell'].items()))}: {row['method']}",
            short_seconds(row["contextualization_seconds"]) if row["contextualization_seconds"] >= NOTHING else "-",
            short_count(row["stored_bytes"]) if row["stored_bytes"] else "-",
            short_seconds(row["first_token_seconds"]),
            "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}",
        )
        for row in report["measured_costs"]
    )
    headings = ("", "to read a context", "bytes kept of it", "to the first token", "tokens a second")
    note = (
        f"Measured on {report['device']}, per context and for one question at a time. Kept are adapters, keys and "
        "values, vectors of passages, and texts that are read again with each question; what serves all contexts is "
        "not counted."
    )
    return ReportTable("Cost, measured", headings, rows, note)


def _measured(report: Mapping[str, Any]) -> ReportTable:
    rows = tuple(
        (
            run["method"],
            short_seconds(run["fit_seconds"]) if run["fit_seconds"] >= 0.01 else "-",
            short_seconds(run["question_seconds"]),
            short_seconds(run["latency_seconds"]),
            short_count(run["peak_bytes"]),
            f"{run['requests']:,}",
            f"{run['truncated']:,}" if run["truncated"] else "-",
            "; ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in run["chosen"].items()) or "-",
            "; ".join(f"{count} x {reason}" for reason, count in run["left_out"].items()) or "-",
        )
        for run in report["methods"]
    )
    headings = (
        *("", "training", "a question, in batches", "a question alone", "peak bytes", "questions"),
        *("cut to the model's limit", "chosen", "contexts left out"),
    )
    note = (
        f"Measured on {report['device']}. Questions are requests to the model: answers, options to rank or windows to "
        "score. The peak is that of PyTorch on a GPU, elsewhere that of the process."
    )
    told = [column for column in range(len(headings)) if any(row[column] != "-" for row in rows)]
    told_rows = tuple(tuple(row[column] for column in told) for row in rows)
    return ReportTable("Time and memory", tuple(headings[column] for column in told), told_rows, note)


def _skipped(report: Mapping[str, Any]) -> ReportTable:
    counts, first = (report["skipped"].get(key, {}) for key in ("counts", "first"))
    rows = tuple((reason, f"{count:,}", first.get(reason, "")) for reason, count in counts.items())
    return ReportTable("Records left out", ("", "records", "first"), rows)
