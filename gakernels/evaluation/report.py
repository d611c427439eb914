"""The report of a run: a JSON file, and the same as Markdown and HTML with the paper's values next to ours."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers

from gakernels.cost.shapes import ModelShape
from gakernels.errors import InputError
from gakernels.evaluation.context_tuning import STEPS
from gakernels.evaluation.cost import COUNTED_METHODS, CostSettings, method_cost
from gakernels.evaluation.metrics import PERPLEXITY, compare, score
from gakernels.evaluation.runner import Runner
from gakernels.evaluation.scenarios import Cell, Measurements, Scenario, length_cell
from gakernels.evaluation.tables import FRACTION, REFERENCE, ReportTable, tables
from gakernels.files import file_sha256, write_text
from gakernels.model import GenerativeAdapter
from gakernels.version import __version__

KIND = "gakernels evaluation"
TOKENS_PER_WORD = 4 / 3  # of retrieved passages
# How the costs of a method are counted, if not under its own name.
COUNTED_AS = {
    "adapter_streaming": "adapter",
    "other_adapter": "adapter",
    "mean_context": "static_lora",
    "sft_lora": "static_lora",
    "sft_full": "closed_book",
    "cpt_lora": "lora_tuning",
    "cpt_full": "full_tuning",
    "context_lora": "lora_tuning",
    "prompt_truncated_first": "prompt",
    "prompt_truncated_last": "prompt",
    "retrieval_embedding": "retrieval",  # what ranking takes is not counted, whichever way it is done
    **{f"context_lora_{steps}": "lora_tuning" for steps in STEPS},
}


def data_hash(path: Path) -> str:
    """SHA-256 of a file; for a folder, of the names and contents of its files."""
    total = hashlib.sha256()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            total.update(f"{file.relative_to(path)}\n".encode())
        total.update(bytes.fromhex(file_sha256(file)))
    return total.hexdigest()


def describe_model(model: GenerativeAdapter) -> dict[str, Any]:
    """What the answers depend on: base model, generator, where and how they run."""
    return {
        "base_fingerprint": model.base_fingerprint(),
        "generator_fingerprint": model.generator_fingerprint(),
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def describe_run(model: GenerativeAdapter) -> dict[str, Any]:
    """The names of the base model (of a folder or file without the path to it) and of the device, and the versions."""
    name = model.base.config.name_or_path
    return {
        "model": Path(name).name if Path(name).exists() else name,
        "versions": {
            "gakernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine(),
    }


def build(
    runner: Runner, settings: Mapping[str, Any], notes: Sequence[str] = (), paper_data: str | None = None
) -> dict[str, Any]:
    """The report, in JSON types.

    Args:
        runner: the runner, after its run.
        settings: of the run, as in the log of answers.
        notes: further remarks for the reader.
        paper_data: one of `paper.DATA`, if data, split and protocol are the paper's: its values are shown too.
    """
    model, scenario = runner.model, runner.scenario
    costs, why_not = _costs(runner)
    measurements = runner.measurements()
    return {
        "kind": KIND,
        "scenario": scenario.name,
        "protocol": scenario.protocol,
        "paper": paper_data,
        "settings": dict(settings),
        "generator": model.config.to_dict(),
        **describe_run(model),
        "contexts": len(scenario.cases),
        "skipped": {
            "counts": scenario.skipped.counts,
            "first": {reason: places[0] for reason, places in scenario.skipped.places.items()},
        },
        "notes": [*notes, *([why_not] if why_not else [])],
        "results": _results(scenario, measurements),
        "comparisons": _comparisons(scenario, measurements),
        "methods": [vars(run) for run in runner.method_runs()],
        "measured_costs": [{**vars(cost), "cell": dict(cost.cell)} for cost in runner.measured_costs()],
        "costs": costs,
    }


def _results(scenario: Scenario, measurements: Mapping[str, Measurements]) -> list[dict[str, Any]]:
    """The scores of all methods, by metric and cell."""
    return [
        {**_about(scenario, cell, metric, PERPLEXITY), "method": method, **vars(score(metric, samples))}
        for method, found in measurements.items()
        for (cell, metric), samples in found.items()
    ]


def _comparisons(scenario: Scenario, measurements: Mapping[str, Measurements]) -> list[dict[str, Any]]:
    """The generated adapter (without one, the first method) compared with every other method, paired."""
    reference = REFERENCE if REFERENCE in measurements else next(iter(measurements))
    return [
        {**_about(scenario, cell, metric, "ratio"), "method": reference, "against": method, **vars(compared)}
        for method, found in measurements.items()
        if method != reference
        for (cell, metric), samples in measurements[reference].items()
        if (compared := compare(metric, samples, found.get((cell, metric), {}))) is not None
    ]


def _about(scenario: Scenario, cell: Cell, metric: str, of_perplexities: str) -> dict[str, Any]:
    """What a value is of, its unit (another one for perplexities), and what its interval resamples."""
    unit = of_perplexities if metric.endswith(PERPLEXITY) else FRACTION
    return {"cell": dict(cell), "metric": metric, "unit": unit, "resampled": scenario.resampled(cell)}


def _costs(runner: Runner) -> tuple[list[dict[str, Any]], str]:
    """The costs of each cell and method; or none, and the reason."""
    scenario = runner.scenario
    try:
        shape = ModelShape.from_config(runner.model.base.config)
    except InputError as error:
        return [], f"Costs can't be told from the shapes of this model: {error}"
    costs = []
    for cell in _cost_cells(scenario):
        context, settings = _sizes(runner, cell)
        for name, method in runner.methods.items():
            counted, read = COUNTED_AS.get(name, name), method.tokens_read(context)
            if counted in COUNTED_METHODS:
                own = replace(settings, epochs=method.passes or settings.epochs)
                cost = method_cost(counted, shape, runner.model.config, read, own)
                costs.append({**cost.to_dict(), "cell": dict(cell), "method": name, "context_tokens": read})
    return costs, ""


def _cost_cells(scenario: Scenario) -> list[Cell]:
    """Cells that differ in the length of their contexts: without task and seed."""
    return list(dict.fromkeys(length_cell(case.cell) for case in scenario.cases))


def _sizes(runner: Runner, cell: Cell) -> tuple[int, CostSettings]:
    """The mean tokens of the contexts of a cell, and of the questions about them."""
    decoder, scenario = runner.decoder, runner.scenario
    cases = [(number, case) for number, case in enumerate(scenario.cases) if length_cell(case.cell) == cell]
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


# Files


def markdown_page(title: str, facts: Sequence[str], shown: Sequence[ReportTable], plots: Sequence[str] = ()) -> str:
    """A page as Markdown; `plots` are the names of image files next to it."""
    parts = [f"# {title}\n\n", *(f"- {line}\n" for line in facts), "\n"]
    parts += [f"![{name}]({name})\n\n" for name in plots]
    parts += [table.markdown() + "\n" for table in shown]
    return "".join(parts).rstrip() + "\n"


def _html_page(title: str, facts: Sequence[str], shown: Sequence[ReportTable], plots: Sequence[str]) -> str:
    """A page as HTML that needs no other file; `plots` are SVG texts, which are embedded."""
    listed = "".join(f"<li>{escape(line)}</li>\n" for line in facts)
    figures = "".join(f"<figure>{plot[plot.index('<svg') :]}</figure>\n" for plot in plots)
    body = "".join(table.html() for table in shown)
    return _PAGE.format(title=escape(title), facts=listed, figures=figures, body=body)


def write(report: Mapping[str, Any], path: Path, plots: Mapping[str, str]) -> list[Path]:
    """Write the JSON, and Markdown, HTML and plots (SVG texts by name) next to it.

    Returns:
        The files.

    Raises:
        OSError, InputError: see `files.write_text`.
    """
    title = f"Evaluation: {report['scenario']}, protocol {report['protocol']}"
    return write_page(report, path, (title, _facts(report), tables(report)), plots, {})


def write_page(
    report: Mapping[str, Any],
    path: Path,
    page: tuple[str, Sequence[str], Sequence[ReportTable]],
    plots: Mapping[str, str],
    others: Mapping[Path, str],
) -> list[Path]:
    """As `write`, of a page of this title, facts and tables; `others` are the texts of further files."""
    images = {f"{path.stem}.{name}.svg": text for name, text in plots.items()}
    written = {
        path: json.dumps(report, indent=2) + "\n",
        **others,
        **{path.with_name(name): text for name, text in images.items()},
        path.with_suffix(".md"): markdown_page(*page, list(images)),
        path.with_suffix(".html"): _html_page(*page, list(images.values())),
    }
    for file, text in written.items():
        write_text(file, text)
    return list(written)


def versions_and_device(report: Mapping[str, Any]) -> str:
    """Of a report, for its reader."""
    return ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + f"; {report['device']}"


def data_digests(hashes: Mapping[str, str]) -> str:
    """The files of a run by their names and the starts of their SHA-256s, for the reader."""
    return ", ".join(f"{name} (sha256 {digest[:16]})" for name, digest in hashes.items())


def _facts(report: Mapping[str, Any]) -> list[str]:
    settings = report["settings"]
    data = data_digests(settings["data"])
    shown = {name: value for name, value in settings.items() if name not in ("data", "base_fingerprint", "scenario")}
    return [
        f"base model {report['model'] or 'without a name'}, fingerprint {settings['base_fingerprint']}",
        f"{f'data {data}' if data else 'data drawn by the seed'}; {report['contexts']:,} contexts",
        "settings: " + ", ".join(f"{name} {value}" for name, value in shown.items() if value not in (None, [])),
        versions_and_device(report),
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
