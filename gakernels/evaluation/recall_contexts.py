"""Contexts about invented people, for recall: nothing that is asked can be known without reading them.

All are drawn from `gakernels.data.people`, with the names held out from the demo's training. A context tells facts
about one person, and, as distractors, facts about other people and about attributes that are not asked for in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from gakernels.data.people import ATTRIBUTES, Attribute, Fact, Person, draw_people
from gakernels.errors import InputError
from gakernels.evaluation.records import Context, Question

FORMS = ("question", "statement")
PARTS = ("early", "middle", "late")
MOST_FACTS = len(ATTRIBUTES)
OTHER_PEOPLE = 8


@dataclass(frozen=True)
class Telling:
    """A sentence of a context.

    Attributes:
        fact: what it tells.
        asked: whether its value is asked for.
        older: the value that was told before and holds no longer; empty where there is none.
    """

    fact: Fact
    asked: bool = False
    older: str = ""


def few_facts(rng: Random, facts: int, distractors: int = 0) -> list[Telling]:
    """Facts about a person among distractors, in random order.

    Raises:
        InputError: there are not that many attributes; with distractors one must be left for them.
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
    """Facts about a person, evenly among distractors: the longest text of at most so many tokens.

    Args:
        rng: what is drawn.
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
    """Facts about a person, the first of which are told again afterwards with another value; these are asked for.

    Raises:
        InputError: there are not that many attributes, or facts.
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


def context(told: Sequence[Telling], form: str, name: str = "", part: str | None = None) -> Context:
    """The text with its questions; a question's options are all values of the attribute, its id the older value.

    Args:
        told: the sentences.
        form: `question`, or `statement`: the sentence up to the value.
        name: of the context.
        part: asks only for what the early, middle or late third of the sentences tells; None for all.

    Raises:
        InputError: there is no such form.
    """
    if form not in FORMS:
        raise InputError(f"form must be one of {', '.join(FORMS)}, but it is {form!r}")
    questions = tuple(
        Question(_prompt(telling.fact, form), (telling.fact.value,), telling.fact.attribute.values, telling.older)
        for place, telling in enumerate(told)
        if telling.asked and part in (None, PARTS[place * len(PARTS) // len(told)])
    )
    return Context(" ".join(telling.fact.statement() for telling in told), questions, name)


def _prompt(fact: Fact, form: str) -> str:
    return fact.question() if form == "question" else fact.statement().removesuffix(f" {fact.value}.")


def _draw(rng: Random, facts: int) -> tuple[list[Fact], Iterator[Fact]]:
    """Facts about one person, and as many as wanted about others and other attributes."""
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
    """One of `asked` at a random place in each of as many even stretches of the whole."""
    told, total = list(filling), len(asked) + len(filling)
    for number, telling in enumerate(asked):
        first, last = number * total // len(asked), (number + 1) * total // len(asked) - 1
        told.insert(rng.randint(first, last), telling)
    return told
