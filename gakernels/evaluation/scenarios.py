"""Scenarios: contexts with what is asked about them, and how; here the common form, and questions about documents and
about conversations (sections 4.1 and 4.3 of the paper)."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from gakernels.data.bad_records import BadRecords
from gakernels.errors import check_known, check_least
from gakernels.evaluation.datasets import Dataset, EvaluationContext, Question
from gakernels.evaluation.metrics import PROTOCOLS, Sample, Samples, answer_exact_match, answer_f1
from gakernels.evaluation.prompts import QA_NEW_TOKENS, QA_STOPS, qa_prompt

_EMPTY_LINE = re.compile(r"\n\s*\n")

Cell = tuple[tuple[str, str | int], ...]


def length_cell(cell: Cell) -> Cell:
    """What distinguishes contexts of different lengths: a cell without task, seed and kind."""
    return tuple((name, value) for name, value in cell if name not in ("task", "seed", "kind"))


@dataclass(frozen=True)
class EvaluationCase:
    """A context, and the cell that its results belong to.

    Attributes:
        context: with its questions.
        cell: names and values that identify a row of the results: (("length", 1024),).
        other: number of the case whose adapter is the control; None if there is no other context of that kind.
        training: examples of the same task, for few-shot tuning.
        validation: further examples, to stop it early.
    """

    context: EvaluationContext
    cell: Cell = ()
    other: int | None = None
    training: tuple[Question, ...] = ()
    validation: tuple[Question, ...] = ()


@dataclass(frozen=True)
class EvaluationRequest:
    """Something that the model is to answer or to score.

    Attributes:
        case: number of the case.
        question: number of the question in it.
        option: number of the option that is scored; -1 if an answer is generated or a text scored.
        query: what retrieval searches for.
        prompt: for the base model, without the context.
        adapted_prompt: for an adapted or tuned model.
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
        """Distinguishes it from all other requests of a method."""
        return self.case, self.question, self.option


# The answer to a request: the generated text, or (loss, tokens).
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
        stops: an answer ends before the first of these texts; they may contain special tokens.
        training: other contexts with their questions, for supervised fine-tuning and the control of the mean context.
        write_prompt: writes a question for an adapted or tuned model, for tuning.
        write_base_prompt: writes one for the base model; None if both are asked alike.
        settings: what else the results depend on, in JSON types.
        skipped: records that were left out.
        resampled: what the intervals of a cell resample: the clusters of its samples.
    """

    name: str
    protocol: str
    cases: tuple[EvaluationCase, ...]
    ask: Callable[[int, EvaluationCase], Sequence[EvaluationRequest]]
    measure: Callable[[Scenario, Answers], Measurements]
    new_tokens: int = 20
    stops: tuple[str, ...] = ("\n",)
    training: tuple[EvaluationContext, ...] = ()
    write_prompt: Callable[[str], str] = str
    settings: Mapping[str, Any] = field(default_factory=dict)
    skipped: BadRecords = field(default_factory=BadRecords)
    resampled: Callable[[Cell], str] = lambda cell: "contexts"
    write_base_prompt: Callable[[str], str] | None = None

    def documents(self) -> list[str]:
        """The passages of all contexts: parts between empty lines, each once."""
        return list(dict.fromkeys(part for case in self.cases for part in parts(case.context.text)))


def parts(text: str) -> list[str]:
    """The parts of a context between empty lines: documents, sessions, demonstrations."""
    return [part.strip() for part in _EMPTY_LINE.split(text) if part.strip()]


def sampled(contexts: Sequence[EvaluationContext], limit: int | None, seed: int = 0) -> list[EvaluationContext]:
    """Contexts with `limit` questions in all, drawn at random, from each category in proportion; all without a limit.

    The draw depends on the seed, the questions and their answers alone: neither on their order nor on how documents are
    grouped. A larger limit adds questions to those of a smaller one.
    """
    if limit is None:
        return list(contexts)
    by_category: dict[str, list[tuple[int, int, int]]] = {}
    for number, context in enumerate(contexts):
        for place, question in enumerate(context.questions):
            drawn = draw_rank(seed, question.text, *question.answers)
            by_category.setdefault(question.category, []).append((drawn, number, place))
    ranked = [
        ((rank + 0.5) / len(category), one)
        for category in by_category.values()
        for rank, one in enumerate(sorted(category))
    ]
    kept = {(number, place) for _, (_, number, place) in sorted(ranked)[:limit]}
    chosen = (
        replace(context, questions=tuple(q for place, q in enumerate(context.questions) if (number, place) in kept))
        for number, context in enumerate(contexts)
    )
    return [context for context in chosen if context.questions]


def draw_rank(seed: int, *texts: str) -> int:
    """A random number that depends on a seed and on texts alone; those with the least numbers are a random sample."""
    return int.from_bytes(hashlib.sha256(repr((seed, *texts)).encode()).digest(), "big")


def with_others(cases: Sequence[EvaluationCase], first: int = 0) -> list[EvaluationCase]:
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
        number: first + numbers[(place + len(numbers) // 2) % len(numbers)]
        for numbers in by_cell.values()
        if len(numbers) > 1
        for place, number in enumerate(numbers)
    }
    return [replace(case, other=others.get(number)) for number, case in enumerate(cases)]


# Questions about documents and conversations


GROUP_PARTS = ("all", "first_tenth")
STYLES = {"official": ("paper", "paper"), "released": ("released", "bare")}


@dataclass(frozen=True)
class AskSettings:
    """How questions are asked, if not as the protocol says.

    Attributes:
        style: of the base model's prompts: `paper`, `released` or `bare`; None for the protocol's.
        adapted_style: of an adapted or tuned model's.
        new_tokens: most tokens of an answer; None for the scenario's.
        limit: most questions, in each cell; None for all.
        sample_seed: of the draw of so many questions.
    """

    style: str | None = None
    adapted_style: str | None = None
    new_tokens: int | None = None
    limit: int | None = None
    sample_seed: int = 0

    def __post_init__(self) -> None:
        check_least(1, new_tokens=self.new_tokens, limit=self.limit)

    def styles(self, protocol: str) -> dict[str, str]:
        """The styles of the base model's prompts and of an adapted model's."""
        check_known("protocol", protocol, PROTOCOLS)
        style, adapted = STYLES[protocol]
        return {"style": self.style or style, "adapted_style": self.adapted_style or adapted}


def docqa(
    data: Dataset,
    measure: Callable[[str], int],
    lengths: Sequence[int] | None,
    protocol: str = "official",
    part: str | None = None,
    training: Sequence[EvaluationContext] = (),
    settings: AskSettings | None = None,
) -> Scenario:
    """Questions about documents, which are grouped into contexts of given lengths.

    Args:
        data: documents with questions (`datasets.read_documents`).
        measure: counts the tokens of a text.
        lengths: average tokens of a context, one cell each; None: one cell, in which each document is a context.
        protocol: `official`: all gold answers, all groups; `released`: one gold answer, the first tenth of the groups.
        part: of the groups, if not the protocol's.
        training: other documents with their questions, see `Scenario`.
        settings: how questions are asked.

    Raises:
        InputError: a length is below 1, or there is no such protocol, part or style.
    """
    settings = settings or AskSettings()
    styles = settings.styles(protocol)
    part = part or ("first_tenth" if protocol == "released" else "all")
    cases: list[EvaluationCase] = []
    cell_lengths: list[int | str] = list(dict.fromkeys(lengths)) if lengths is not None else ["own"]
    for length in cell_lengths:
        contexts = data.contexts if isinstance(length, str) else group_contexts(data.contexts, length, measure, part)
        drawn = sampled(contexts, settings.limit, settings.sample_seed)
        cells = [EvaluationCase(context, (("length", length),)) for context in drawn]
        cases += with_others(cells, len(cases))
    told = {"part": part, "lengths": cell_lengths}
    return question_scenario("docqa", protocol, cases, settings, styles, training, told, data.skipped)


def dialog(
    data: Dataset,
    questions: str,
    protocol: str = "official",
    training: Sequence[EvaluationContext] = (),
    settings: AskSettings | None = None,
) -> Scenario:
    """Questions about what was said in earlier conversations: a context is all conversations of a person.

    Args:
        data: conversations with questions (`datasets.read_msc`, `read_persona_chat`, `read_locomo`).
        questions: their kind; `response` asks for the next turn, without an instruction.
        protocol: which gold answers count, see `metrics.answer_f1`; the released code has no personalisation.
        training: other conversations with questions about them, see `Scenario`.
        settings: how questions are asked.

    Raises:
        InputError: there is no such protocol or style.
    """
    settings = settings or AskSettings()
    styles = settings.styles(protocol)
    if questions == "response":
        styles = dict.fromkeys(styles, "bare")
    cell = (("questions", questions),)
    drawn = sampled(data.contexts, settings.limit, settings.sample_seed)
    cases = with_others([EvaluationCase(context, cell) for context in drawn])
    told = {"questions": questions}
    return question_scenario("dialog", protocol, cases, settings, styles, training, told, data.skipped)


def question_scenario(
    name: str,
    protocol: str,
    cases: Sequence[EvaluationCase],
    settings: AskSettings,
    styles: Mapping[str, str],
    training: Sequence[EvaluationContext] = (),
    told: Mapping[str, Any] | None = None,
    skipped: BadRecords | None = None,
) -> Scenario:
    """The scenario that asks every question of every context for a free answer.

    Args:
        name, protocol, cases, training, skipped: see `Scenario`.
        settings: how questions are asked.
        styles: `style` and `adapted_style` of the prompts.
        told: what else the results depend on.
    """
    style, adapted_style = styles["style"], styles["adapted_style"]

    def ask(number: int, case: EvaluationCase) -> list[EvaluationRequest]:
        return [
            EvaluationRequest(
                number,
                place,
                query=question.text,
                prompt=qa_prompt(question.text, None, style),
                adapted_prompt=qa_prompt(question.text, None, adapted_style),
            )
            for place, question in enumerate(case.context.questions)
        ]

    return Scenario(
        name,
        protocol,
        tuple(cases),
        ask,
        _measure_answers,
        settings.new_tokens or QA_NEW_TOKENS,
        QA_STOPS,
        tuple(training),
        lambda question: qa_prompt(question, None, adapted_style),
        {**(told or {}), **styles},
        skipped or BadRecords(),
        write_base_prompt=lambda question: qa_prompt(question, None, style),
    )


def _measure_answers(scenario: Scenario, answers: Answers) -> Measurements:
    """F1 and exact match of each question, in each cell, and in each category of its questions."""
    found: dict[tuple[Cell, str], dict[Hashable, Sample]] = {}
    for key in sorted(answers):
        case = scenario.cases[key[0]]
        question = case.context.questions[key[1]]
        cells: list[Cell] = [case.cell]
        if question.category:
            cells.append((*case.cell, ("category", question.category)))
        for metric, score in (("f1", answer_f1), ("exact_match", answer_exact_match)):
            value = score(str(answers[key]), question.answers, scenario.protocol)
            for cell in cells:
                found.setdefault((cell, metric), {})[key] = Sample(key[0], value)
    return found


def group_contexts(
    contexts: Iterable[EvaluationContext], length: int, measure: Callable[[str], int] = len, part: str = "all"
) -> list[EvaluationContext]:
    """Contexts of about `length`, each of consecutive documents with all their questions (section 4.1 of the paper).

    As in the authors' released code: documents of the same text count once, ceil(total / length) groups get equally
    many documents (the first ones one more), and the texts are joined by empty lines.

    Args:
        contexts: documents with their questions.
        length: average length of a group.
        measure: the length of a text: `len` for characters, or a function that counts tokens.
        part: `all` groups, or the `first_tenth`, which is all that the released code scores.

    Raises:
        InputError: length is below 1, or there is no such part.
    """
    check_least(1, length=length)
    check_known("part", part, GROUP_PARTS)
    documents = _by_text(contexts)
    count = math.ceil(measure("\n\n".join(document.text for document in documents)) / length)
    scored = count if part == "all" else max(1, count // 10)
    groups = _split_evenly(documents, count)[:scored]
    return [_join(group) for group in groups if group]  # documents longer than `length` leave groups empty


def _by_text(contexts: Iterable[EvaluationContext]) -> list[EvaluationContext]:
    merged: dict[str, EvaluationContext] = {}
    for context in contexts:
        before = merged.get(context.text, EvaluationContext(context.text, (), context.name))
        merged[context.text] = EvaluationContext(context.text, before.questions + context.questions, before.name)
    return list(merged.values())


def _split_evenly(documents: Sequence[EvaluationContext], count: int) -> list[Sequence[EvaluationContext]]:
    size, more = divmod(len(documents), count)
    bounds = [size * n + min(n, more) for n in range(count + 1)]
    return [documents[start:end] for start, end in pairwise(bounds)]


def _join(group: Sequence[EvaluationContext]) -> EvaluationContext:
    names = dict.fromkeys(context.name for context in group)
    questions = tuple(question for context in group for question in context.questions)
    return EvaluationContext("\n\n".join(context.text for context in group), questions, ", ".join(names))
