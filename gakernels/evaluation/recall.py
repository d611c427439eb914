"""Scenario: recall of invented facts by their number, context length and position; overwritten and single facts.

Contexts are about invented people, so nothing that is asked can be known without reading them. All are drawn from
`gakernels.data.people`, with the names held out from the demo's training. A context tells facts about one person and,
as distractors, facts about other people and about attributes that it is not asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random

from gakernels.data.people import ATTRIBUTES, Attribute, Fact, Person, draw_people
from gakernels.errors import InputError, check_known, check_least
from gakernels.evaluation.datasets import EvaluationContext, Question
from gakernels.evaluation.metrics import Sample, answer_exact_match
from gakernels.evaluation.scenarios import (
    Answers,
    Cell,
    EvaluationCase,
    EvaluationRequest,
    Measurements,
    Scenario,
    sampled,
    with_others,
)

TESTS = ("facts", "length", "position", "distractors", "overwritten", "needle")
NEW_TOKENS = 6
STOPS = (".", "\n", "Question:")
CHANCE = 1 / 64  # every attribute has 64 values
FORMS = ("question", "statement")
PARTS = ("early", "middle", "late")
MOST_FACTS = len(ATTRIBUTES)
OTHER_PEOPLE = 8


@dataclass(frozen=True)
class RecallSettings:
    """What is drawn; the defaults suit the demo's base model, which reads 1,024 tokens.

    Attributes:
        tests: which of `TESTS`.
        contexts: in each cell.
        facts: about the person in `facts`, one cell each.
        lengths: tokens of a context in `length` and `needle`, one cell each (the paper: 512 to 32K).
        position_length: tokens of a context in `position`, where each third of the text is a cell.
        distractors: distractors of a context in `distractors`, one cell each.
        overwritten: how many facts are told again in `overwritten`, one cell each.
        told: facts about the person in all tests but `facts` and `needle`.
        form: how to ask: a `question`, or a `statement`, the sentence up to the value.
        seed: of the random draws.
        limit: most questions in each cell; None for all.
        sample_seed: of the draw of so many questions.

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
    sample_seed: int = 0

    def __post_init__(self) -> None:
        unknown = [test for test in self.tests if test not in TESTS]
        if unknown or not self.tests:
            raise InputError(f"tests must be among {', '.join(TESTS)}, but they are {', '.join(self.tests) or 'none'}")
        check_known("form", self.form, FORMS)
        check_least(1, contexts=self.contexts, position_length=self.position_length, told=self.told, limit=self.limit)


def recall(settings: RecallSettings, measure: Callable[[str], int]) -> Scenario:
    """The scenario.

    Metrics: `accuracy`, the share of answers that are the value; in `overwritten` also `old_value`, the share that are
    the earlier, now wrong value.

    Args:
        settings: what is drawn.
        measure: counts the tokens of a sentence, without those that begin a text.

    Raises:
        InputError: a number is out of range.
    """
    by_cell: dict[Cell, list[EvaluationContext]] = {}
    for test in dict.fromkeys(settings.tests):
        for cell, made in _contexts(test, settings, measure):
            by_cell.setdefault(cell, []).append(made)
    cases: list[EvaluationCase] = []
    for cell, contexts in by_cell.items():
        drawn = sampled(contexts, settings.limit, settings.sample_seed)
        cases += with_others([EvaluationCase(each, cell) for each in drawn], len(cases))

    def ask(number: int, case: EvaluationCase) -> list[EvaluationRequest]:
        return [
            EvaluationRequest(number, place, query=question.text, prompt=question.text, adapted_prompt=question.text)
            for place, question in enumerate(case.context.questions)
        ]

    described = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
    described["chance"] = CHANCE
    return Scenario("recall", "official", tuple(cases), ask, _measure, NEW_TOKENS, STOPS, settings=described)


def _contexts(
    test: str, settings: RecallSettings, measure: Callable[[str], int]
) -> Iterator[tuple[Cell, EvaluationContext]]:
    """The contexts of a test, each drawn with its own seed: more contexts leave the first ones unchanged."""
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
    """Whether each answer is the value and, if there is an older value, whether it is that, in each cell."""
    found: dict[tuple[Cell, str], dict[Hashable, Sample]] = {}
    for key in sorted(answers):
        case = scenario.cases[key[0]]
        question = case.context.questions[key[1]]
        for metric, values in (("accuracy", question.answers), ("old_value", (question.id,))):
            if values[0]:
                right = answer_exact_match(str(answers[key]), values, scenario.protocol)
                found.setdefault((case.cell, metric), {})[key] = Sample(key[0], right)
    return found


# Contexts


@dataclass(frozen=True)
class Telling:
    """A sentence of a context.

    Attributes:
        fact: what it tells.
        asked: whether its value is asked for.
        older: the value that was told before and no longer holds; empty if there is none.
    """

    fact: Fact
    asked: bool = False
    older: str = ""


def few_facts(rng: Random, facts: int, distractors: int = 0) -> list[Telling]:
    """Facts about a person among distractors, in random order.

    Raises:
        InputError: there are too few attributes; distractors need one of their own.
    """
    most = MOST_FACTS - bool(distractors)
    if not 1 <= facts <= most or distractors < 0:
        raise InputError(
            f"facts must be between 1 and {most}, and distractors at least 0, but they are {facts} and {distractors}"
        )
    asked, others = _draw(rng, facts)
    told = [Telling(fact, True) for fact in asked] + [Telling(next(others)) for _ in range(distractors)]
    rng.shuffle(told)
    return told


def long_context(rng: Random, facts: int, tokens: int, measure: Callable[[str], int]) -> list[Telling]:
    """Facts about a person, spread evenly among distractors: the longest text of at most so many tokens.

    Args:
        rng: source of randomness.
        facts: about the person.
        tokens: of the whole text.
        measure: counts the tokens of a sentence.

    Raises:
        InputError: the facts alone are longer, or there are too many of them.
    """
    if not 1 <= facts < MOST_FACTS:
        raise InputError(f"facts must be between 1 and {MOST_FACTS - 1}, but it is {facts}")
    asked, others = _draw(rng, facts)
    left = tokens - sum(measure(fact.statement()) for fact in asked)
    if left < 0:
        raise InputError(f"{facts} facts need a context of {tokens - left} tokens or more, but it is {tokens}")
    filling: list[Telling] = []
    while (left := left - measure((fact := next(others)).statement())) >= 0:
        filling.append(Telling(fact))
    return _spread(rng, [Telling(fact, True) for fact in asked], filling)


def overwritten_facts(rng: Random, facts: int, overwritten: int) -> list[Telling]:
    """Facts about a person, of which the first are told again later with other values; the later values are asked for.

    Raises:
        InputError: there are too few attributes or facts.
    """
    if not 1 <= overwritten <= facts <= MOST_FACTS:
        raise InputError(
            f"overwritten must be between 1 and the facts, of which there are at most {MOST_FACTS}, but it is "
            f"{overwritten} of {facts}"
        )
    old, _ = _draw(rng, facts)
    newer = [_changed(rng, fact) for fact in old[:overwritten]]
    told = [Telling(fact) for fact in old]
    again = [Telling(new, True, fact.value) for new, fact in zip(newer, old, strict=False)]
    rng.shuffle(told)
    rng.shuffle(again)
    return told + again


def context(told: Sequence[Telling], form: str, name: str = "", part: str | None = None) -> EvaluationContext:
    """The text with its questions; the options of a question are all values of the attribute, its id the older value.

    Args:
        told: the sentences.
        form: `question`, or `statement`: the sentence up to the value.
        name: of the context.
        part: ask only what the early, middle or late third of the sentences tells; None for all.

    Raises:
        InputError: there is no such form.
    """
    check_known("form", form, FORMS)
    questions = tuple(
        Question(_prompt(telling.fact, form), (telling.fact.value,), telling.fact.attribute.values, telling.older)
        for place, telling in enumerate(told)
        if telling.asked and part in (None, PARTS[place * len(PARTS) // len(told)])
    )
    return EvaluationContext(" ".join(telling.fact.statement() for telling in told), questions, name)


def _prompt(fact: Fact, form: str) -> str:
    return fact.question() if form == "question" else fact.statement().removesuffix(f" {fact.value}.")


def _draw(rng: Random, facts: int) -> tuple[list[Fact], Iterator[Fact]]:
    """Facts about one person, and an endless supply about other people and attributes."""
    person, *others = draw_people(rng, 1 + OTHER_PEOPLE, "test")
    attributes = rng.sample(ATTRIBUTES, MOST_FACTS)
    return [_fact(rng, person, attribute) for attribute in attributes[:facts]], _facts(rng, others, attributes[facts:])


def _facts(rng: Random, people: Sequence[Person], attributes: Sequence[Attribute]) -> Iterator[Fact]:
    while True:
        yield _fact(rng, rng.choice(people), rng.choice(attributes))


def _fact(rng: Random, person: Person, attribute: Attribute) -> Fact:
    return Fact(person, attribute, rng.choice(attribute.values))


def _changed(rng: Random, fact: Fact) -> Fact:
    values = [value for value in fact.attribute.values if value != fact.value]
    return Fact(fact.person, fact.attribute, rng.choice(values))


def _spread(rng: Random, asked: Sequence[Telling], filling: Sequence[Telling]) -> list[Telling]:
    """The whole cut into even stretches, with one of `asked` at a random place in each."""
    told, total = list(filling), len(asked) + len(filling)
    for number, telling in enumerate(asked):
        first, last = number * total // len(asked), (number + 1) * total // len(asked) - 1
        told.insert(rng.randint(first, last), telling)
    return told
