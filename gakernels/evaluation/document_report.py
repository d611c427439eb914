"""The report of `gakernels eval documents`: its tables, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from gakernels.evaluation.document_reading import PAGE_BYTES, KeptBytes, ReadingCost
from gakernels.evaluation.document_sets import METRICS, OWN, SINGLE, SetScore, SetScores
from gakernels.evaluation.metrics import PERPLEXITY, Estimate
from gakernels.evaluation.report import describe_run, markdown_page, versions_and_device
from gakernels.evaluation.tables import FRACTION, ReportTable, interval_text, short_seconds
from gakernels.model import GenerativeAdapter

KIND = "gakernels documents"
LABELS = {
    "closed_book": "closed book",
    "prompt": "document in the prompt",
    OWN: "own adapter",
    "other_adapter": "another's adapter",
    "updates_added": "updates added",
    "states_added": "states added",
    "one_stream": "one stream of all",
}


def build(
    model: GenerativeAdapter,
    costs: Sequence[ReadingCost],
    kept: KeptBytes,
    sets: SetScores,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The report in JSON types."""
    return {
        "kind": KIND,
        **describe_run(model),
        "settings": dict(settings),
        "generator": model.config.to_dict(),
        "threads": torch.get_num_threads(),
        "reading": [asdict(cost) for cost in costs],
        "kept": asdict(kept),
        "sets": asdict(sets),
    }


def tables(costs: Sequence[ReadingCost], kept: KeptBytes, sets: SetScores) -> list[ReportTable]:
    """Everything that was measured."""
    return [
        _reading(costs),
        _memory(costs, kept),
        _appending(costs),
        *(_scores(sets, metric) for metric in METRICS),
        _combining(sets),
    ]


def markdown(report: Mapping[str, Any], shown: Sequence[ReportTable]) -> str:
    """The report as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    facts = [f"{report['model']}, {settings}", f"{versions_and_device(report)}, {report['threads']} threads"]
    return markdown_page("Documents", facts, shown)


def _reading(costs: Sequence[ReadingCost]) -> ReportTable:
    rows = tuple(
        (
            _size(cost.bytes),
            f"{cost.tokens:,}",
            _duration(cost.read_seconds),
            f"{cost.tokens / cost.read_seconds:,.0f}",
            short_seconds(cost.adapter_seconds),
        )
        for cost in costs
    )
    headings = ("document", "tokens", "to read it", "tokens a second", "to form its adapter")
    return ReportTable("Reading a document", headings, rows)


def _memory(costs: Sequence[ReadingCost], kept: KeptBytes) -> ReportTable:
    rows = tuple(
        (
            _size(cost.bytes),
            _mib(cost.peak_bytes),
            _mib(cost.added_bytes),
            "-" if cost.cache_bytes is None else _mib(cost.cache_bytes),
        )
        for cost in costs
    )
    compact = "" if kept.compact is None else f", {_mib(kept.compact)} as a compact adapter"
    note = (
        f"Kept of a document of any size: {_mib(kept.adapter)} as an adapter{compact}, and {_mib(kept.state)} (its "
        "state) if more is to be appended. The peak is that of PyTorch on a GPU, elsewhere that of the process."
    )
    headings = ("document", "peak while reading", "more than before", "its keys and values")
    return ReportTable("Memory", headings, rows, note)


def _appending(costs: Sequence[ReadingCost]) -> ReportTable:
    rows = tuple(
        (
            _size(cost.bytes),
            f"{cost.page_tokens:,}",
            short_seconds(cost.page_seconds),
            _duration(cost.read_seconds + cost.page_tokens * cost.read_seconds / cost.tokens),
        )
        for cost in costs
    )
    note = (
        f"A page has {PAGE_BYTES:,} bytes; the new adapter is formed too. Reading all again is computed, not measured."
    )
    headings = ("read before", "tokens of a page", "to append it", "reading all again")
    return ReportTable("Appending a page", headings, rows, note)


def _scores(sets: SetScores, metric: str) -> ReportTable:
    scores = [one for one in sets.scores if one.metric == metric]
    perplexity = metric.endswith(PERPLEXITY)
    name = "Perplexity of the gold answers" if perplexity else "F1 of the answers"
    rows = tuple(
        (
            _label(one),
            _text(one.score, PERPLEXITY if perplexity else FRACTION),
            _text(one.against_own, "ratio" if perplexity else FRACTION),
        )
        for one in scores
    )
    note = (
        f"{sets.questions} questions about {sets.documents} documents; 95% intervals over sets. In a set all documents "
        "share an adapter: the sum of their updates, that of the sum of their states, or that of a stream of all."
    )
    headings = ("perplexity", f"over {LABELS[OWN]}") if perplexity else ("F1 (%)", f"minus {LABELS[OWN]}")
    return ReportTable(name, ("", *headings), rows, note)


def _combining(sets: SetScores) -> ReportTable:
    counts = list(next(iter(sets.seconds.values())))
    rows = tuple(
        (LABELS[way], *(_duration(seconds[count]) for count in counts)) for way, seconds in sets.seconds.items()
    )
    note = "The documents have been read before, except for the stream, which reads them."
    return ReportTable("Making the adapter of a set", ("", *(f"{count} documents" for count in counts)), rows, note)


def _label(one: SetScore) -> str:
    return LABELS[one.way] if one.way in SINGLE else f"{one.documents}: {LABELS[one.way]}"


def _text(estimate: Estimate | None, unit: str) -> str:
    return interval_text(None if estimate is None else {**vars(estimate), "unit": unit})


def _size(count: int) -> str:
    """Bytes, shortly: these are round numbers."""
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000**power:,g} {('B', 'kB', 'MB', 'GB')[power]}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB" if count < 10 * 2**20 else f"{count / 2**20:,.0f} MiB"


def _duration(seconds: float) -> str:
    """Minutes and seconds from two minutes on."""
    return short_seconds(seconds) if seconds < 120 else f"{seconds // 60:,.0f} min {seconds % 60:.0f} s"
