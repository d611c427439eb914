"""Scenario: contexts with what is asked about them, and how; the common form of all evaluations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gakernels.evaluation.records import Context, Question
from gakernels.evaluation.samples import Samples

_EMPTY_LINE = re.compile(r"\n\s*\n")

Cell = tuple[tuple[str, str | int], ...]


@dataclass(frozen=True)
class Case:
    """A context, and where its results belong.

    Attributes:
        context: with its questions.
        cell: names and values that tell a row of the results: (("length", 1024),).
        other: number of the case whose adapter is the control; None where there is no other context of that kind.
        training: examples of the same task, for few-shot tuning.
        validation: further ones, to stop it early.
    """

    context: Context
    cell: Cell = ()
    other: int | None = None
    training: tuple[Question, ...] = ()
    validation: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Request:
    """Something that the model is to answer or to score.

    Attributes:
        case: number of the case.
        question: number of the question in it.
        option: number of the option that is scored; -1 where an answer is generated or a text scored.
        query: what retrieval looks for.
        prompt: as the base model is asked, without the context.
        adapted_prompt: as an adapted or tuned model is asked.
        continuation: None to generate; an option (text); or token ids of which all but the first are scored.
    """

    case: int
    question: int
    option: int = -1
    query: str = ""
    prompt: str = ""
    adapted_prompt: str = ""
    continuation: str | tuple[int, ...] | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """Tells it from all other requests of a method."""
        return self.case, self.question, self.option


# Of a request: the generated text, or (loss, tokens).
Answer = str | tuple[float, int]
Answers = Mapping[tuple[int, int, int], Answer]
Measurements = Mapping[tuple[Cell, str], Samples]


@dataclass(frozen=True)
class Scenario:
    """An evaluation.

    Attributes:
        name: `docqa`, `icl`, ...
        protocol: `official` or `released` (docs/evaluation.md).
        cases: at least one.
        ask: the requests of a case, by its number.
        measure: the samples of a method's answers, by cell and metric.
        new_tokens: most tokens of an answer.
        stops: texts in front of which an answer ends; special tokens may be part of them.
        training: question and answer pairs of other contexts, for supervised fine-tuning.
        write_prompt: how an adapted or tuned model is asked a question, for tuning.
        settings: what else the results depend on, JSON types.
        skipped: records that were left out, by reason, with the first place.
    """

    name: str
    protocol: str
    cases: tuple[Case, ...]
    ask: Callable[[int, Case], Sequence[Request]]
    measure: Callable[[Scenario, Answers], Measurements]
    new_tokens: int = 20
    stops: tuple[str, ...] = ("\n",)
    training: tuple[Question, ...] = ()
    write_prompt: Callable[[str], str] = str
    settings: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, Any] = field(default_factory=dict)

    def documents(self) -> list[str]:
        """The passages of all contexts: parts between empty lines, each once."""
        return list(dict.fromkeys(part for case in self.cases for part in parts(case.context.text)))


def parts(text: str) -> list[str]:
    """The parts of a context between empty lines: documents, sessions, demonstrations."""
    return [part.strip() for part in _EMPTY_LINE.split(text) if part.strip()]


def limited(contexts: Sequence[Context], limit: int | None) -> list[Context]:
    """The first contexts with the first `limit` questions together; all without a limit."""
    if limit is None:
        return list(contexts)
    kept, left = [], limit
    for context in contexts:
        if left <= 0:
            break
        kept.append(Context(context.text, context.questions[:left], context.name))
        left -= len(context.questions)
    return kept


def with_others(cases: Sequence[Case], first: int = 0) -> list[Case]:
    """The same cases, each with another one of the same cell: the one half-way round, because neighbours in a file are
    often about the same thing.

    Args:
        cases: in any order.
        first: number that the first of them will have in the scenario.
    """
    by_cell: dict[Cell, list[int]] = {}
    for number, case in enumerate(cases):
        by_cell.setdefault(case.cell, []).append(number)
    others = {
        number: numbers[(place + len(numbers) // 2) % len(numbers)]
        for numbers in by_cell.values()
        if len(numbers) > 1
        for place, number in enumerate(numbers)
    }
    return [
        Case(case.context, case.cell, _shifted(others.get(number), first), case.training, case.validation)
        for number, case in enumerate(cases)
    ]


def _shifted(number: int | None, first: int) -> int | None:
    return None if number is None else number + first
