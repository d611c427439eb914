"""The report of a run: one JSON, and the same as Markdown and HTML with the paper's values beside the measured ones."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers

from gakernels.cost.shapes import ModelShape
from gakernels.errors import InputError
from gakernels.evaluation import paper_results
from gakernels.evaluation.cases import Cell, Measurements, Scenario
from gakernels.evaluation.cost import CostSettings, method_cost
from gakernels.evaluation.paper_costs import TABLE_1
from gakernels.evaluation.runner import Runner
from gakernels.evaluation.samples import compare, score
from gakernels.evaluation.tables import ReportTable, short_count, short_seconds
from gakernels.files import write_text
from gakernels.model import GenerativeAdapter
from gakernels.version import __version__

KIND = "gakernels evaluation"
TOKENS_PER_WORD = 4 / 3  # of retrieved passages
REFERENCE = "adapter"  # what the other methods are compared with
# How the costs of a method are counted, where that is not under its own name; those missing have no formula.
COUNTED_AS = {
    "closed_book": "closed_book",
    "prompt": "prompt",
    "retrieval": "retrieval",
    "adapter": "adapter",
    "adapter_streaming": "adapter",
    "adapter_merged": "adapter_merged",
    "adapter_retrieval": "adapter_retrieval",
    "other_adapter": "adapter",
    "static_lora": "static_lora",
    "sft_lora": "static_lora",
    "sft_full": "closed_book",
    "cpt_lora": "lora_tuning",
    "cpt_full": "full_tuning",
    "context_lora": "lora_tuning",
}
INTERVALS = "Values with 95% bootstrap intervals, which resample whole contexts."
Rows = tuple[tuple[str, ...], ...]
_PERCENT = {"f1", "exact_match", "match", "ranking_accuracy", "ranking_macro_f1", "accuracy", "old_value"}


def data_hash(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of the names and contents of its files."""
    total = hashlib.sha256()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            total.update(f"{file.relative_to(path)}\n".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def describe_model(model: GenerativeAdapter) -> dict[str, Any]:
    """What the answers depend on: base model, generator, where and how they run."""
    return {
        "base_fingerprint": model.base_fingerprint(),
        "generator_fingerprint": model.generator_fingerprint(),
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def build(runner: Runner, settings: Mapping[str, Any], notes: Sequence[str] = ()) -> dict[str, Any]:
    """The report, JSON types.

    Args:
        runner: after its run.
        settings: of the run, as they stand in the log of answers.
        notes: further remarks for the reader.
    """
    model, scenario = runner.model, runner.scenario
    costs, why_not = _costs(runner)
    measurements = runner.measurements()
    return {
        "kind": KIND,
        "scenario": scenario.name,
        "protocol": scenario.protocol,
        "settings": dict(settings),
        "model": model.base.config.name_or_path,
        "generator": model.config.to_dict(),
        "versions": {
            "gakernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine(),
        "contexts": len(scenario.cases),
        "skipped": dict(scenario.skipped),
        "notes": [*notes, *([why_not] if why_not else [])],
        "results": _results(measurements),
        "comparisons": _comparisons(measurements),
        "methods": [vars(run) for run in runner.method_runs()],
        "costs": costs,
    }


def _results(measurements: Mapping[str, Measurements]) -> list[dict[str, Any]]:
    """The scores of all methods, by metric and cell."""
    return [
        {"cell": dict(cell), "method": method, "metric": metric, **score(metric, samples).to_dict()}
        for method, found in measurements.items()
        for (cell, metric), samples in found.items()
    ]


def _comparisons(measurements: Mapping[str, Measurements]) -> list[dict[str, Any]]:
    """The generated adapter against every other method, paired."""
    return [
        {"cell": dict(cell), "metric": metric, "method": REFERENCE, "against": method, **vars(compared)}
        for method, found in measurements.items()
        if method != REFERENCE
        for (cell, metric), samples in measurements.get(REFERENCE, {}).items()
        if (compared := compare(metric, samples, found.get((cell, metric), {}))) is not None
    ]


def _costs(runner: Runner) -> tuple[list[dict[str, Any]], str]:
    """For each cell and method; or none, and why."""
    scenario = runner.scenario
    try:
        shape = ModelShape.from_config(runner.model.base.config, runner.model.base.config.name_or_path)
    except InputError as error:
        return [], f"Costs can't be told from the shapes of this model: {error}"
    costs = []
    for cell in _cost_cells(scenario):
        context, settings = _sizes(runner, cell)
        for name in runner.methods:
            if name in COUNTED_AS:
                cost = method_cost(COUNTED_AS[name], shape, runner.model.config, context, settings)
                costs.append({**cost.to_dict(), "cell": dict(cell), "method": name, "context_tokens": context})
    return costs, ""


def _cost_cells(scenario: Scenario) -> list[Cell]:
    """Cells that differ in the length of their contexts: without task and seed."""
    return list(dict.fromkeys(_length_cell(case.cell) for case in scenario.cases))


def _length_cell(cell: Cell) -> Cell:
    return tuple((name, value) for name, value in cell if name not in ("task", "seed", "kind"))


def _sizes(runner: Runner, cell: Cell) -> tuple[int, CostSettings]:
    """Mean tokens of the contexts of a cell, and of what is asked about them."""
    decoder, scenario = runner.decoder, runner.scenario
    cases = [(number, case) for number, case in enumerate(scenario.cases) if _length_cell(case.cell) == cell]
    context = fmean(len(decoder.encode(case.context.text)) for _, case in cases)
    requests = [request for number, case in cases for request in scenario.ask(number, case)[:8]]
    asked = fmean(
        len(request.continuation)
        if isinstance(request.continuation, tuple)
        else len(decoder.encode(request.adapted_prompt))
        for request in requests
    )
    width = next(runner.model.base.parameters()).element_size()
    given, usual = runner.method_settings, CostSettings()
    found = min(round(context), round(given.passages * given.passage_words * TOKENS_PER_WORD))
    epochs = given.epochs or usual.epochs
    return round(context), CostSettings(round(asked), scenario.new_tokens, max(found, 1), epochs, width)


# Tables


def tables(report: Mapping[str, Any]) -> list[ReportTable]:
    """All tables of a report: its own, what the paper reports, and the cost by shapes."""
    found = [*own_tables(report), *_paper(report), _shape_costs(report)]
    return [table for table in found if table.rows]


def own_tables(report: Mapping[str, Any]) -> list[ReportTable]:
    """Quality, how methods compare, what was measured, what was left out."""
    found = [*_quality(report), *_compared(report), _measured(report), _skipped(report)]
    return [table for table in found if table.rows]


def _quality(report: Mapping[str, Any]) -> list[ReportTable]:
    results = report["results"]
    methods = list(dict.fromkeys(row["method"] for row in results))
    made = []
    for metric in dict.fromkeys(row["metric"] for row in results):
        by_cell: dict[Cell, dict[str, Any]] = {}
        for row in results:
            if row["metric"] == metric:
                by_cell.setdefault(tuple(row["cell"].items()), {})[row["method"]] = row
        rows = [
            (cell_name(cell), *(_value(by_method.get(method), metric) for method in methods), _counts(by_method))
            for cell, by_method in by_cell.items()
        ]
        unit = " (%)" if metric in _PERCENT else ""
        headings = ("", *methods, "scored / contexts")
        made.append(ReportTable(f"{metric.replace('_', ' ')}{unit}", headings, tuple(rows), INTERVALS))
    return made


def _compared(report: Mapping[str, Any]) -> list[ReportTable]:
    rows = report["comparisons"]
    methods = list(dict.fromkeys(row["against"] for row in rows))
    made = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        by_cell: dict[Cell, dict[str, Any]] = {}
        for row in rows:
            if row["metric"] == metric:
                by_cell.setdefault(tuple(row["cell"].items()), {})[row["against"]] = row
        ratio = metric not in _PERCENT
        title = f"{metric.replace('_', ' ')}: {REFERENCE} {'over' if ratio else 'minus'} the others"
        table = tuple(
            (cell_name(cell), *(_value(found.get(method), metric) for method in methods))
            for cell, found in by_cell.items()
        )
        note = f"On the same questions, paired. {'Below 1' if ratio else 'Above 0'}: the adapter is better. {INTERVALS}"
        made.append(ReportTable(title + ("" if ratio else " (%)"), ("", *methods), table, note))
    return made


def cell_name(cell: Cell) -> str:
    """As it stands in tables and plots."""
    return ", ".join(f"{name} {value}" for name, value in cell) or "all"


def _value(row: Mapping[str, Any] | None, metric: str) -> str:
    if row is None:
        return "-"
    factor, digits = (100, 1) if metric in _PERCENT else (1, 3)
    value, low, high = (factor * row[key] for key in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _counts(by_method: Mapping[str, Mapping[str, Any]]) -> str:
    counts = sorted({(row["count"], row["contexts"]) for row in by_method.values()})
    return "; ".join(f"{count:,} / {contexts:,}" for count, contexts in counts)


def _paper(report: Mapping[str, Any]) -> list[ReportTable]:
    """The paper's values for the same scenario; they are of other models and, unless the files are the same, data."""
    note = "The paper's models and training; comparable only with the same base model, data and protocol."
    if report["scenario"] == "docqa":
        return [_table_5(part, note) for part in paper_results.TABLE_5]
    if report["scenario"] == "dialog":
        rows: Rows = tuple(
            (row.model, f"{paper_results.TABLE_1_F1[row.model]:.1f}", f"{row.tera_operations:.3f}", row.floats)
            for row in TABLE_1
        )
        title = "Paper, table 1: Mistral-7B-Instruct, MSC-Self-Instruct"
        return [ReportTable(title, ("", "F1 (%)", "TFLOPS", "extra storage (M floats)"), rows, note)]
    if report["scenario"] == "perplexity":
        rows = tuple((name, f"{a:.2f}", f"{b:.2f}") for name, (a, b) in paper_results.TABLE_2.items())
        title = "Paper, table 2: Mistral-7B-Instruct, SlimPajama"
        return [ReportTable(title, ("", "reconstruction perplexity", "completion perplexity"), rows, note)]
    if report["scenario"] == "icl":
        rows = (("adapter", f"{paper_results.METAICL_ACCURACY:.1f}"),)
        title = "Paper, abstract: Mistral-7B-Instruct, MetaICL"
        return [ReportTable(title, ("", "accuracy (%), mean of 26 tasks"), rows, note)]
    return []


def _table_5(part: paper_results.DocumentQuestions, note: str) -> ReportTable:
    methods = ("closed_book", "sft_full", "cpt_full", "prompt", "adapter")
    rows = tuple(
        (f"length {length}", *(f"{part.values(length)[method]:.1f}" for method in methods))
        for length in paper_results.LENGTHS
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
    return ReportTable("Cost", headings, rows, note)


def _measured(report: Mapping[str, Any]) -> ReportTable:
    rows = tuple(
        (
            run["method"],
            short_seconds(run["fit_seconds"]) if run["fit_seconds"] >= 0.01 else "-",
            short_seconds(run["contextualization_seconds"]),
            short_seconds(run["question_seconds"]),
            short_seconds(run["latency_seconds"]),
            short_count(run["peak_bytes"]),
            f"{run['requests']:,}",
            f"{run['truncated']:,}",
            "; ".join(f"{count} x {reason}" for reason, count in run["left_out"].items()) or "-",
        )
        for run in report["methods"]
    )
    headings = (
        *("", "training", "a context", "a question, in batches", "a question alone", "peak bytes", "questions"),
        *("cut to the model's limit", "contexts left out"),
    )
    note = (
        f"Measured on {report['device']}. Questions are requests to the model: answers, options to rank or windows to "
        "score. The peak is that of PyTorch on a GPU, elsewhere that of the process."
    )
    return ReportTable("Time and memory", headings, rows, note)


def _skipped(report: Mapping[str, Any]) -> ReportTable:
    counts, first = (report["skipped"].get(key, {}) for key in ("counts", "first"))
    rows = tuple((reason, f"{count:,}", first.get(reason, "")) for reason, count in counts.items())
    return ReportTable("Records left out", ("", "records", "first"), rows)


# Files


def markdown(report: Mapping[str, Any], plots: Sequence[str] = ()) -> str:
    """The report to read; plots are names of image files beside it."""
    parts = [f"# {_title(report)}\n", *(f"- {line}\n" for line in _facts(report)), "\n"]
    parts += [f"![{name}]({name})\n\n" for name in plots]
    parts += [table.markdown() + "\n" for table in tables(report)]
    return "".join(parts).rstrip() + "\n"


def html(report: Mapping[str, Any], plots: Sequence[str] = ()) -> str:
    """The same as one page; plots are SVG texts, which become part of it."""
    facts = "".join(f"<li>{escape(line)}</li>\n" for line in _facts(report))
    figures = "".join(f"<figure>{plot[plot.index('<svg') :]}</figure>\n" for plot in plots)
    body = "".join(table.html() for table in tables(report))
    return _PAGE.format(title=escape(_title(report)), facts=facts, figures=figures, body=body)


def write(report: Mapping[str, Any], path: Path, plots: Mapping[str, str]) -> list[Path]:
    """Write the JSON, and Markdown, HTML and plots (SVG texts by name) beside it.

    Returns:
        The files.

    Raises:
        OSError, InputError: as `files.write_text`.
    """
    images = {f"{path.stem}.{name}.svg": text for name, text in plots.items()}
    written = {
        path: json.dumps(report, indent=2) + "\n",
        **{path.with_name(name): text for name, text in images.items()},
        path.with_suffix(".md"): markdown(report, list(images)),
        path.with_suffix(".html"): html(report, list(images.values())),
    }
    for file, text in written.items():
        write_text(file, text)
    return list(written)


def _title(report: Mapping[str, Any]) -> str:
    return f"Evaluation: {report['scenario']}, protocol {report['protocol']}"


def _facts(report: Mapping[str, Any]) -> list[str]:
    settings = report["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    data = ", ".join(f"{name} (sha256 {digest[:16]})" for name, digest in settings["data"].items())
    shown = {name: value for name, value in settings.items() if name not in ("data", "base_fingerprint", "scenario")}
    return [
        f"base model {report['model'] or 'without a name'}, fingerprint {settings['base_fingerprint']}",
        f"{f'data {data}' if data else 'data drawn by the seed'}; {report['contexts']:,} contexts",
        "settings: " + ", ".join(f"{name} {value}" for name, value in shown.items() if value not in (None, [])),
        f"{versions}; {report['device']}",
        *report["notes"],
    ]


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; font-size: 0.9em; }}
th, td {{ border: 1px solid #ccc; padding: 0.25em 0.6em; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 1em 0; }}
svg {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<ul>
{facts}</ul>
{figures}{body}</body>
</html>
"""
