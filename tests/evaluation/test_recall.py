"""Invented contexts for recall: what they tell, what is asked, and how answers are counted."""

import re
from collections.abc import Callable
from random import Random

import pytest
import torch
from matplotlib.figure import Figure

from gakernels import InputError
from gakernels.data.people import ATTRIBUTES, FIRST_NAMES, LAST_NAMES, is_held_out
from gakernels.evaluation.datasets import Question
from gakernels.evaluation.metrics import score
from gakernels.evaluation.plots import draw_recall
from gakernels.evaluation.recall import (
    CHANCE,
    TESTS,
    RecallSettings,
    context,
    few_facts,
    long_context,
    overwritten_facts,
    recall,
)
from gakernels.evaluation.scenarios import Cell, Scenario

SENTENCE = re.compile(r"The (\w+) (?:of|that) (\w+ \w+)(?: \w+)? is (\w+ \w+)\.")
QUESTION = re.compile(r"Question: What is the (\w+) of (\w+ \w+)\? Answer:")
START = re.compile(r"The (\w+) (?:of|that) (\w+ \w+)(?: \w+)? is")
MANY = RecallSettings(contexts=3, lengths=(100, 300), position_length=300)


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def random(generator: torch.Generator) -> Random:
    return Random(generator.initial_seed())


def told(text: str) -> list[tuple[str, str, str]]:
    """Attribute, person and value of each sentence, read from the text alone."""
    found = SENTENCE.findall(text)
    assert " ".join(match.group() for match in SENTENCE.finditer(text)) == text
    return [(attribute, person, value) for attribute, person, value in found]


def values(text: str, question: str) -> list[str]:
    """What a text tells about what is asked, in its order."""
    match = QUESTION.fullmatch(question) or START.fullmatch(question)
    assert match
    return [value for attribute, person, value in told(text) if (attribute, person) == match.groups()]


def asked(scenario: Scenario) -> list[tuple[Cell, str, Question]]:
    return [(case.cell, case.context.text, question) for case in scenario.cases for question in case.context.questions]


@pytest.mark.parametrize("form", ["question", "statement"])
def test_the_answer_is_what_the_text_told_last_and_nothing_else_in_it_is_about_the_question(
    random: Random, form: str
) -> None:
    scenario = recall(RecallSettings(contexts=3, lengths=(100, 300), form=form, seed=random.randrange(10**9)), words)
    assert {cell[0][0] for cell, _, _ in asked(scenario)} == set(TESTS)
    for ((test, _),), text, question in asked(scenario):
        found = values(text, question.text)
        assert (found[-1],) == question.answers
        assert found[:-1] == ([question.id] if test == "overwritten" else [])
        assert question.id != question.answers[0]
        assert len(set(question.options)) * CHANCE == 1
        assert question.answers[0] in question.options


def test_distractors_are_about_other_people_and_other_attributes(random: Random) -> None:
    drawn = context(few_facts(random, 5, 30), "question")
    about = [QUESTION.fullmatch(question.text) for question in drawn.questions]
    ((person,), attributes) = ({match[2] for match in about if match}, {match[1] for match in about if match})
    others = [(attribute, name) for attribute, name, _ in told(drawn.text) if name != person]
    assert len(others) == 30
    assert len(told(drawn.text)) == 35
    assert len(attributes) == 5
    assert not attributes & {attribute for attribute, _ in others}


def test_all_people_are_held_out_from_the_training_of_the_demo(random: Random) -> None:
    for _, name, _ in told(context(few_facts(random, 5, 30), "question").text):
        first, last = name.split()
        assert is_held_out(FIRST_NAMES.index(first), LAST_NAMES.index(last))


def test_a_long_context_is_the_longest_that_fits(random: Random) -> None:
    for length in (80, 200, 1000):
        text = context(long_context(random, 6, length, words), "question").text
        longest = max(words(attribute.statement) for attribute in ATTRIBUTES) + 2  # two words each for name and value
        assert length - longest < words(text) <= length


def test_facts_lie_all_over_a_long_context(random: Random) -> None:
    places = [place for _ in range(30) for place, each in _shares(long_context(random, 8, 600, words)) if each.asked]
    assert min(places) < 0.1
    assert max(places) > 0.9
    thirds = [sum(part <= 3 * place < part + 1 for place in places) for part in range(3)]
    assert all(60 <= count <= 100 for count in thirds)  # of 240; a third of 8 stretches is 2 or 3 of them


def _shares(told: list) -> list:
    return [(number / len(told), each) for number, each in enumerate(told)]


def test_thirds_of_a_text_are_asked_about_apart(random: Random) -> None:
    scenario = recall(RecallSettings(tests=("position",), contexts=6, seed=random.randrange(10**9)), words)
    for cell, text, question in asked(scenario):
        match = QUESTION.fullmatch(question.text)
        assert match
        sentences = told(text)
        (place,) = (number for number, sentence in enumerate(sentences) if sentence[:2] == match.groups())
        assert cell == (("position", ("early", "middle", "late")[3 * place // len(sentences)]),)
    assert len({question.text for _, _, question in asked(scenario)}) == len(asked(scenario)) == 6 * 8


def test_a_seed_gives_the_same_contexts_and_more_contexts_begin_with_the_same(random: Random) -> None:
    seed = random.randrange(10**9)

    def texts(contexts: int, seed: int) -> dict[Cell, list[str]]:
        found: dict[Cell, list[str]] = {}
        for case in recall(RecallSettings(contexts=contexts, lengths=(100,), seed=seed), words).cases:
            found.setdefault(case.cell, []).append(case.context.text)
        return found

    few, more = texts(2, seed), texts(4, seed)
    assert texts(2, seed) == few
    position = [(("position", part),) for part in ("early", "middle", "late")]
    assert all(more[cell][: len(few[cell])] == few[cell] for cell in few)
    assert all(len(more[cell]) == 4 for cell in more if cell not in position)
    assert not {text for line in texts(2, seed + 1).values() for text in line} & {
        t for line in few.values() for t in line
    }


@pytest.mark.parametrize("reader", ["last", "first", "wrong"])
def test_readers_are_counted_by_what_they_read(random: Random, reader: str) -> None:
    scenario = recall(RecallSettings(contexts=3, lengths=(100,), seed=random.randrange(10**9)), words)

    def answer(text: str, question: Question) -> str:
        found = values(text, question.text)
        return {"last": found[-1], "first": found[0], "wrong": "none"}[reader]

    answers = {
        (number, place, -1): answer(case.context.text, question)
        for number, case in enumerate(scenario.cases)
        for place, question in enumerate(case.context.questions)
    }
    for (((test, _),), metric), samples in scenario.measure(scenario, answers).items():
        right = reader == "last" or (reader == "first" and test != "overwritten")
        expected = right if metric == "accuracy" else reader == "first"
        assert (test == "overwritten") or metric == "accuracy"
        assert score(metric, samples).value == expected


def test_the_control_is_another_context_of_the_same_cell() -> None:
    cases = recall(MANY, words).cases
    for number, case in enumerate(cases):
        assert case.other not in (None, number)
        assert cases[case.other].cell == case.cell
        assert cases[case.other].context.text != case.context.text


def test_a_limit_bounds_the_questions_of_each_cell() -> None:
    settings = RecallSettings(contexts=3, lengths=(100, 300), limit=5)
    counts: dict[Cell, int] = {}
    for cell, _, _ in asked(recall(settings, words)):
        counts[cell] = counts.get(cell, 0) + 1
    assert max(counts.values()) == 5
    assert counts[(("facts", 24),)] == 5
    assert counts[(("needle", 100),)] == 3


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RecallSettings(tests=("facts", "nothing")), "tests"),
        (lambda: RecallSettings(tests=()), "tests"),
        (lambda: RecallSettings(form="poem"), "form"),
        (lambda: RecallSettings(contexts=0), "contexts"),
        (lambda: RecallSettings(limit=0), "limit"),
        (lambda: recall(RecallSettings(facts=()), words), "facts"),
        (lambda: recall(RecallSettings(facts=(25,)), words), "25"),
        (lambda: recall(RecallSettings(distractors=(-1,)), words), "-1"),
        (lambda: recall(RecallSettings(told=24), words), "24"),
        (lambda: recall(RecallSettings(overwritten=(0,)), words), "overwritten"),
        (lambda: recall(RecallSettings(lengths=(20,)), words), "20"),
        (lambda: context(overwritten_facts(Random(0), 2, 1), "poem"), "form"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        make()


def test_the_plot_has_a_panel_for_each_test_with_the_values() -> None:
    cells = [{"facts": 4}, {"facts": 8}, {"position": "early"}]
    rows = [
        {"metric": "accuracy", "unit": "fraction", "cell": cell, "method": method, "value": value}
        | {"low": value - 10, "high": value + 5}
        for method, start in (("adapter", 50), ("prompt", 70))
        for cell, value in zip(cells, (start, start + 10, start - 20), strict=True)
    ]
    figure = Figure()
    draw_recall(figure, rows, 100 * CHANCE)
    drawn = [[list(line.lines[0].get_ydata()) for line in axes.containers] for axes in figure.axes]
    assert drawn == [[[50, 60], [70, 80]], [[30], [50]]]
    assert figure.get_supylabel() == "accuracy (%)"
