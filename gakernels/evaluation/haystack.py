"""Scenario: a needle in a haystack, one number in a long text that says nothing, by length and depth.

Text and question are those of Doc-to-LoRA's evaluation (arXiv 2602.15902), which took the filling from older work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from gakernels.errors import InputError
from gakernels.evaluation.datasets import EvaluationContext, Question
from gakernels.evaluation.scenarios import (
    AskSettings,
    EvaluationCase,
    Scenario,
    question_scenario,
    sampled,
    with_others,
)

FILLING = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the special magic number? Reply with only the number."
DEPTHS = 10


@dataclass(frozen=True)
class HaystackSettings:
    """What is drawn.

    Attributes:
        lengths: tokens of a context, one cell each.
        contexts: in each cell; the needle is in each tenth of the text equally often.
        seed: of the random draws.

    Raises:
        InputError: a number is below 1.
    """

    lengths: tuple[int, ...]
    contexts: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        least = min((self.contexts, *self.lengths))
        if least < 1:
            raise InputError(f"lengths and contexts must be at least 1, but one is {least}")


def haystack(
    drawn: HaystackSettings,
    measure: Callable[[str], int],
    protocol: str = "official",
    settings: AskSettings | None = None,
) -> Scenario:
    """The scenario. `exact_match` is the share of right numbers, also for each tenth of the text (`category`).

    Args:
        drawn: what is drawn.
        measure: counts the tokens of a text.
        protocol: `official` or `released`, which here differ in the usual style of the prompts alone.
        settings: how questions are asked.

    Raises:
        InputError: a length has no room for the needle, or there is no such protocol or style.
    """
    settings = settings or AskSettings()
    cases: list[EvaluationCase] = []
    for length in dict.fromkeys(drawn.lengths):
        lines = _lines(length, measure)
        contexts = [_context(lines, length, number, drawn) for number in range(drawn.contexts)]
        asked = sampled(contexts, settings.limit, settings.sample_seed)
        cases += with_others([EvaluationCase(each, (("length", length),)) for each in asked], len(cases))
    told = {"lengths": list(drawn.lengths), "contexts": drawn.contexts}
    return question_scenario("haystack", protocol, cases, settings, settings.styles(protocol), told=told)


def _lines(length: int, measure: Callable[[str], int]) -> int:
    """The lines, with the needle's, of the longest haystack of about `length` tokens."""
    needle, more = measure(_text(1, 0, "0000")), measure(_text(3, 0, "0000"))
    each = (more - needle) / 2
    lines = 1 + int((length - needle) / each)
    while lines > 1 and measure(_text(lines, 0, "0000")) > length:
        lines -= 1
    if lines < DEPTHS:
        least = measure(_text(DEPTHS, 0, "0000"))
        told = f"lengths must be at least {least}, the tokens of a haystack of {DEPTHS} lines"
        raise InputError(f"{told}, but one is {length}")
    return lines


def _context(lines: int, length: int, number: int, drawn: HaystackSettings) -> EvaluationContext:
    """A haystack with the needle at a random line of one tenth of the text."""
    rng, depth = Random(f"{drawn.seed} {length} {number}"), number * DEPTHS // drawn.contexts
    first, after = (-(-tenth * lines // DEPTHS) for tenth in (depth, depth + 1))
    magic = f"{rng.randrange(10_000):04d}"
    category = f"{100 * depth // DEPTHS} to {100 * (depth + 1) // DEPTHS}% deep"
    name = f"{length} {number}"
    question = Question(QUESTION, (magic,), id=name, category=category)
    return EvaluationContext(_text(lines, rng.randrange(first, after), magic), (question,), name)


def _text(lines: int, place: int, magic: str) -> str:
    told = [FILLING] * lines
    told[place] = f"The special magic number is {magic}."
    return "\n".join(told)
