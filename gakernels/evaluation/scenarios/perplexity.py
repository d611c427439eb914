"""Perplexity of a context itself (reconstruction) and of the text behind it (completion): the paper's ablation metric.

A document's first n tokens are the context, as text; its windows and those of the next n tokens are scored. The first
token of a window is never predicted, whatever stands in front of it, so that all methods score the same tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from gakernels.errors import InputError
from gakernels.evaluation.cases import Answers, Case, Cell, Measurements, Request, Scenario, with_others
from gakernels.evaluation.metrics import PROTOCOLS
from gakernels.evaluation.records import Context, Question
from gakernels.evaluation.samples import Sample
from gakernels.model.windows import split_evenly

PARTS = ("reconstruction", "completion")
NAMES = {part: f"{part}_perplexity" for part in PARTS}


def perplexity(
    documents: Sequence[tuple[str, str]],
    windows: Sequence[tuple[Sequence[int], Sequence[int]]],
    window_size: int,
    protocol: str = "official",
) -> Scenario:
    """The scenario.

    Args:
        documents: the text of each context, and its name.
        windows: token ids of each context and of what follows it, at least two of each.
        window_size: most tokens scored together.
        protocol: `official`: all tokens count alike; `released`: all documents do.

    Raises:
        InputError: there is no document, a part has fewer than two tokens, or there is no such protocol.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}, but it is {protocol!r}")
    if not documents or any(len(part) < 2 for pair in windows for part in pair):
        raise InputError("there must be at least one document, and at least two tokens of context and of what follows")
    pieces = [
        [(part, piece) for part, tokens in zip(PARTS, pair, strict=True) for piece in split_evenly(tokens, window_size)]
        for pair in windows
    ]
    cases = with_others(
        [
            Case(Context(text, tuple(Question(part, ("",)) for part, _ in parts), name))
            for (text, name), parts in zip(documents, pieces, strict=True)
        ]
    )

    def ask(number: int, case: Case) -> list[Request]:
        return [
            Request(number, place, query=case.context.text, continuation=tuple(piece))
            for place, (_, piece) in enumerate(pieces[number])
            if len(piece) > 1
        ]

    return Scenario("perplexity", protocol, tuple(cases), ask, _measure, 1)


def _measure(scenario: Scenario, answers: Answers) -> Measurements:
    """The losses of the windows of either part; by the released protocol a document counts once, with its mean."""
    found: dict[tuple[Cell, str], dict[Hashable, Sample]] = {}
    for (case, place, _), answer in sorted(answers.items()):
        if not isinstance(answer, str):
            part = scenario.cases[case].context.questions[place].text
            found.setdefault(((), NAMES[part]), {})[case, place] = Sample(case, *answer)
    return {key: _documents(samples) if scenario.protocol == "released" else samples for key, samples in found.items()}


def _documents(windows: Mapping[Hashable, Sample]) -> dict[Hashable, Sample]:
    """A sample for each document: the mean loss of its tokens."""
    sums: dict[int, tuple[float, float]] = {}
    for window in windows.values():
        total, weight = sums.get(window.context, (0.0, 0.0))
        sums[window.context] = total + window.total, weight + window.weight
    return {document: Sample(document, total / weight) for document, (total, weight) in sums.items()}
