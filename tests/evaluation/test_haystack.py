"""A needle in a haystack: where it is, how long the text is, and what counts as found."""

import re
from collections import Counter

import pytest
import torch

from gakernels.errors import InputError
from gakernels.evaluation.haystack import HaystackSettings, haystack
from gakernels.evaluation.scenarios import AskSettings


def words(text: str) -> int:
    return len(text.split())


def test_the_needle_is_in_each_tenth_of_a_text_that_is_as_long_as_may_be(generator: torch.Generator) -> None:
    seed = generator.initial_seed()
    lengths = (400, 2000)
    asked = haystack(HaystackSettings(lengths, 40, seed), words)
    assert Counter(dict(case.cell)["length"] for case in asked.cases) == {400: 40, 2000: 40}
    depths = Counter()
    for case in asked.cases:
        length, lines = dict(case.cell)["length"], case.context.text.split("\n")
        (question,) = case.context.questions
        assert length - 20 < words(case.context.text) <= length  # a line has 19 words
        needles = [(place, line) for place, line in enumerate(lines) if re.search(r"\d", line)]
        assert needles == [(needles[0][0], f"The special magic number is {question.answers[0]}.")]
        assert re.fullmatch(r"\d{4}", question.answers[0])
        tenth = 10 * needles[0][0] // len(lines)
        assert question.category == f"{10 * tenth} to {10 * tenth + 10}% deep"
        depths[length, tenth] += 1
        assert asked.cases[case.other].cell == case.cell
    assert set(depths.values()) == {4}
    again = haystack(HaystackSettings((2000,), 40, seed), words)
    assert [case.context for case in again.cases] == [case.context for case in asked.cases[40:]]
    other = haystack(HaystackSettings((2000,), 40, seed + 1), words)
    assert [case.context for case in other.cases] != [case.context for case in asked.cases[40:]]


def test_only_the_number_itself_counts() -> None:
    asked = haystack(HaystackSettings((400,), 10), words, settings=AskSettings(limit=4))
    golds = [case.context.questions[0].answers[0] for case in asked.cases]
    assert len(golds) == 4
    answers = {(0, 0, -1): golds[0], (1, 0, -1): f" {golds[1]}.", (2, 0, -1): "The grass", (3, 0, -1): "12345"}
    found = asked.measure(asked, answers)
    whole = {key: sample.total for key, sample in found[(("length", 400),), "exact_match"].items()}
    assert list(whole.values()) == [1, 1, 0, 0]


def test_lengths_without_room_are_refused() -> None:
    # Nine lines of 19 words and one of 6.
    with pytest.raises(InputError, match="at least 177, the tokens of a haystack of 10 lines, but one is 176"):
        haystack(HaystackSettings((400, 176)), words)
    assert haystack(HaystackSettings((177,)), words).cases
    with pytest.raises(InputError, match="must be at least 1, but one is 0"):
        HaystackSettings((400,), 0)
