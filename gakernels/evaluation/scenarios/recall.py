"""Recall of invented facts: how many, from how long a context, from where in it, overwritten ones, a single one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, dataclass
from random import Random

from gakernels.errors import InputError
from gakernels.evaluation.cases import Answers, Case, Cell, Measurements, Request, Scenario, limited, with_others
from gakernels.evaluation.metrics import answer_exact_match
from gakernels.evaluation.recall_contexts import (
    FORMS,
    PARTS,
    Telling,
    context,
    few_facts,
    long_context,
    overwritten_facts,
)
from gakernels.evaluation.records import Context
from gakernels.evaluation.samples import Sample

TESTS = ("facts", "length", "position", "distractors", "overwritten", "needle")
NEW_TOKENS = 6
STOPS = (".", "\n", "Question:")
CHANCE = 1 / 64  # every attribute has 64 values


@dataclass(frozen=True)
class RecallSettings:
    """What is drawn; the defaults suit the demo's base model, which reads 1,024 tokens.

    Attributes:
        tests: which of `TESTS`.
        contexts: of each cell.
        facts: about the person, a cell each, in `facts`.
        lengths: tokens of a context, a cell each, in `length` and `needle` (the paper: 512 to 32K).
        position_length: tokens of a context in `position`, where a third of the text is a cell.
        distractors: a cell each, in `distractors`.
        overwritten: how many of the facts are told anew, a cell each, in `overwritten`.
        told: facts about the person in all tests but `facts` and `needle`.
        form: what is asked: `question`, or `statement`, the sentence up to the value.
        seed: of the drawing.
        limit: most questions in each cell; None for all.

    Raises:
        InputError: there is no such test or form, or a number is out of range.
    """

    tests: tuple[str, ...] = TESTS
    contexts: int = 20
    facts: tuple[int, ...] = (4, 8, 16, 24)
    lengths: tuple[int, ...] = (128, 256, 512, 1024)
    position_length: int = 512
    distractors: tuple[int, ...] = (0, 8, 16, 32)
    overwritten: tuple[int, ...] = (1, 4, 8)
    told: int = 8
    form: str = "question"
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        unknown = [test for test in self.tests if test not in TESTS]
        if unknown or not self.tests:
            raise InputError(f"tests must be among {', '.join(TESTS)}, but they are {', '.join(self.tests) or 'none'}")
        if self.form not in FORMS:
            raise InputError(f"form must be one of {', '.join(FORMS)}, but it is {self.form!r}")
        for name in ("contexts", "position_length", "told", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")


def recall(settings: RecallSettings, measure: Callable[[str], int]) -> Scenario:
    """The scenario.

    Metrics: `accuracy`, the share of answers that are the value; in `overwritten` also `old_value`, the share that are
    the value that holds no longer.

    Args:
        settings: what is drawn.
        measure: counts the tokens of a sentence, without those that begin a text.

    Raises:
        InputError: a number is out of range.
    """
    by_cell: dict[Cell, list[Context]] = {}
    for test in dict.fromkeys(settings.tests):
        for cell, drawn in _contexts(test, settings, measure):
            by_cell.setdefault(cell, []).append(drawn)
    cases: list[Case] = []
    for cell, contexts in by_cell.items():
        cases += with_others([Case(each, cell) for each in limited(contexts, settings.limit)], len(cases))

    def ask(number: int, case: Case) -> list[Request]:
        return [
            Request(number, place, query=question.text, prompt=question.text, adapted_prompt=question.text)
            for place, question in enumerate(case.context.questions)
        ]

    described = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
    described["chance"] = CHANCE
    return Scenario("recall", "official", tuple(cases), ask, _measure, NEW_TOKENS, STOPS, settings=described)


def _contexts(test: str, settings: RecallSettings, measure: Callable[[str], int]) -> Iterator[tuple[Cell, Context]]:
    """The contexts of a test, each drawn by a seed of its own: with more of them the first ones stay."""
    for value in _values(test, settings):
        for number in range(settings.contexts):
            name = f"{test} {value} {number}"
            told = _telling(test, value, Random(f"{settings.seed} {name}"), settings, measure)
            for part in PARTS if test == "position" else (None,):
                drawn = context(told, settings.form, name, part)
                if drawn.questions:
                    yield ((test, part or value),), drawn


def _values(test: str, settings: RecallSettings) -> tuple[int, ...]:
    if test == "position":
        return (settings.position_length,)
    name = "lengths" if test in ("length", "needle") else test
    values: tuple[int, ...] = getattr(settings, name)
    if not values:
        raise InputError(f"{name} must have at least one value for the test {test!r}")
    return tuple(dict.fromkeys(values))


def _telling(
    test: str, value: int, rng: Random, settings: RecallSettings, measure: Callable[[str], int]
) -> list[Telling]:
    if test == "facts":
        return few_facts(rng, value)
    if test == "distractors":
        return few_facts(rng, settings.told, value)
    if test == "overwritten":
        return overwritten_facts(rng, max(settings.told, value), value)
    return long_context(rng, 1 if test == "needle" else settings.told, value, measure)


def _measure(scenario: Scenario, answers: Answers) -> Measurements:
    """Whether each answer is the value, and where there is an older one, whether it is that, in each cell."""
    found: dict[tuple[Cell, str], dict[Hashable, Sample]] = {}
    for key in sorted(answers):
        case = scenario.cases[key[0]]
        question = case.context.questions[key[1]]
        for metric, values in (("accuracy", question.answers), ("old_value", (question.id,))):
            if values[0]:
                right = answer_exact_match(str(answers[key]), values, scenario.protocol)
                found.setdefault((case.cell, metric), {})[key] = Sample(key[0], right)
    return found
