"""Scores of answers, against the official scripts' own wording, scikit-learn's numbers, and plain loops."""

import math
import random
import string
from collections import defaultdict

import pytest
import torch

from gakernels.errors import InputError
from gakernels.evaluation.metrics import (
    answer_exact_match,
    answer_f1,
    best_option,
    label_match,
    macro_f1,
    mean_score,
    normalize_answer,
    released_answer,
)

WORDS = ("the", "a", "an", "The", "An", "café", "N.F.L.", "49ers", "theatre", ",", ".", "'", "½", "St.", "Louis")
WORDS += ("rock-n-roll", "they're", "24-10", "ß", "İ")


@pytest.fixture
def draw(generator: torch.Generator) -> random.Random:
    return random.Random(generator.initial_seed())


def phrase(draw: random.Random, most: int = 6) -> str:
    space = draw.choice([" ", "  ", "\t", " \n"])
    return space.join(draw.choice(WORDS) for _ in range(draw.randint(0, most)))


def plain_words(text: str) -> list[str]:
    """The official normalisation, letter by letter and word by word; no \\b, which is what is checked elsewhere."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def plain_f1(prediction: str, answer: str) -> float:
    given, gold = plain_words(prediction), plain_words(answer)
    left, same = list(gold), 0
    for word in given:
        if word in left:
            left.remove(word)
            same += 1
    if same == 0:
        return 0.0
    precision, recall = same / len(given), same / len(gold)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Norman-conquest, of a\tCity!", "normanconquest of city"),
        ("an apple and the theatre", "apple and theatre"),
        ("“The” ½ café", "“ ” ½ café"),  # an article is what stands between word boundaries; these quotes stay
        ("a.b", "ab"),  # punctuation goes first
        ("...", ""),
    ],
)
def test_normalisation(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


def test_f1_and_exact_match_are_the_best_over_the_gold_answers(draw: random.Random) -> None:
    nonzero = 0
    for _ in range(300):
        answers = [phrase(draw) for _ in range(draw.randint(1, 4))]
        prediction = draw.choice([phrase(draw), draw.choice(answers).upper()])
        wanted = max(plain_f1(prediction, answer) for answer in answers)
        assert answer_f1(prediction, answers) == pytest.approx(wanted, abs=1e-12)
        equal = any(plain_words(prediction) == plain_words(answer) for answer in answers)
        assert answer_exact_match(prediction, answers) == float(equal)
        nonzero += 0 < wanted < 1
    assert nonzero > 30


@pytest.mark.parametrize(
    ("prediction", "answers", "f1", "exact"),
    [
        ("Denver Broncos", ["Denver Broncos", "Denver Broncos", "Broncos"], 1, 1),
        ("the Broncos of Denver", ["Denver Broncos"], 0.8, 0),
        ("Carolina", ["Denver Broncos"], 0, 0),
        ("gold gold", ["gold"], 2 / 3, 0),  # a word counts as often as it occurs
        ("", ["the"], 0, 1),  # no word in common, but equal: what version 1.1 of the script says
    ],
)
def test_worked_examples(prediction: str, answers: list[str], f1: float, exact: float) -> None:
    assert answer_f1(prediction, answers) == pytest.approx(f1)
    assert answer_exact_match(prediction, answers) == exact


def test_the_released_protocol_has_one_gold_answer() -> None:
    answers = ["in the city of Santa Clara", " santa clara ", "Levi's Stadium"]
    assert released_answer(answers) == "Santa clara"
    assert answer_f1("Levi's Stadium", answers) == 1
    assert answer_f1("Levi's Stadium", answers, "released") == 0
    assert answer_f1("Santa Clara city", answers, "released") == pytest.approx(0.8)
    assert answer_exact_match("the Santa Clara", answers, "released") == 1


@pytest.mark.parametrize(("prediction", "answer"), [("", "the"), ("...", "the"), ("the", "?")])
def test_released_scores_of_blank_texts_are_zero(prediction: str, answer: str) -> None:
    assert answer_exact_match(prediction, [answer]) == 1
    assert answer_exact_match(prediction, [answer], "released") == 0
    assert answer_f1(prediction, [answer], "released") == 0


def test_labels() -> None:
    assert label_match(" positive\n", "positive") == 1
    assert label_match("Positive", "positive") == 0
    assert label_match("Output: Positive", "positive") == 0
    assert label_match("Output: Positive", "positive", "released") == 1
    assert label_match("neutral", "positive", "released") == 0


def test_options_are_ranked_by_loss_per_token() -> None:
    assert best_option([6.0, 4.0, 9.0], [2, 1, 4]) == 2
    assert best_option([4.0, 2.0], [2, 1]) == 0


def metaicl_macro_f1(predictions: list[str], answers: list[str]) -> float:
    """MetaICL's own way: precision and recall of each gold label, as means of hits."""
    precisions, recalls = defaultdict(list), defaultdict(list)
    for prediction, answer in zip(predictions, answers, strict=True):
        recalls[answer].append(prediction == answer)
        precisions[prediction].append(prediction == answer)
    f1s = []
    for label, hits in recalls.items():
        recall = sum(hits) / len(hits)
        precision = sum(precisions[label]) / len(precisions[label]) if label in precisions else 1.0
        f1s.append(0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall))
    return sum(f1s) / len(f1s)


def drawn_labels(draw: random.Random) -> tuple[list[str], list[str]]:
    labels = list("abcdef"[: draw.randint(1, 6)])
    count = draw.randint(1, 30)
    answers = draw.choices(labels, k=count)
    return [draw.choice([answer, *labels, "other"]) for answer in answers], answers


def test_macro_f1_over_gold_labels_is_metaicls(draw: random.Random) -> None:
    for _ in range(20):
        predictions, answers = drawn_labels(draw)
        found = macro_f1(predictions, answers, gold_labels_only=True).value
        assert found == pytest.approx(metaicl_macro_f1(predictions, answers), abs=1e-12)


def test_macro_f1_is_scikit_learns(draw: random.Random) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    for _ in range(20):
        predictions, answers = drawn_labels(draw)
        wanted = sklearn.f1_score(answers, predictions, average="macro", zero_division=0)
        assert macro_f1(predictions, answers).value == pytest.approx(wanted, abs=1e-12)
        hits = [label_match(*pair) for pair in zip(predictions, answers, strict=True)]
        assert mean_score(hits).value == pytest.approx(sklearn.accuracy_score(answers, predictions), abs=1e-12)


def test_macro_f1_worked_out_by_hand() -> None:
    # a: 2 right of 2 given and 3 gold: F1 0.8; b: 1 right of 2 given and 2 gold: F1 0.5; c is only given: 0.
    predictions, answers = ["a", "a", "b", "b", "c"], ["a", "a", "a", "b", "b"]
    assert macro_f1(predictions, answers).value == pytest.approx((0.8 + 0.5 + 0) / 3)
    assert macro_f1(predictions, answers, gold_labels_only=True).value == pytest.approx((0.8 + 0.5) / 2)


def test_a_mean_counts_questions_and_contexts(draw: random.Random) -> None:
    scores = [draw.random() for _ in range(50)]
    contexts = [draw.randrange(7) for _ in scores]
    score = mean_score(scores, contexts)
    assert score.value == pytest.approx(sum(scores) / 50)
    assert (score.count, score.contexts) == (50, len(set(contexts)))
    assert score.low < score.value < score.high
    assert mean_score(scores, contexts) == score
    assert mean_score(scores, seed=1).low != mean_score(scores).low


def test_the_interval_is_the_normal_one_for_many_questions(draw: random.Random) -> None:
    scores = [float(draw.random() < 0.3) for _ in range(900)]
    score = mean_score(scores)
    deviation = math.sqrt(score.value * (1 - score.value) / 900)
    # 10,000 resamples place a quantile to 2.7 hundredths of a standard deviation.
    assert score.high - score.value == pytest.approx(1.96 * deviation, abs=0.16 * deviation)
    assert score.value - score.low == pytest.approx(1.96 * deviation, abs=0.16 * deviation)


def test_questions_of_one_context_are_not_independent() -> None:
    contexts = [number // 10 for number in range(400)]
    together = [float(context % 2) for context in contexts]
    apart, clustered = mean_score(together), mean_score(together, contexts)
    # 40 contexts instead of 400 questions: wider by the square root of ten.
    assert (clustered.high - clustered.low) / (apart.high - apart.low) == pytest.approx(10**0.5, rel=0.15)


def test_macro_f1_has_an_interval_around_it(draw: random.Random) -> None:
    answers = draw.choices("abc", k=200)
    predictions = [answer if draw.random() < 0.7 else draw.choice("abc") for answer in answers]
    score = macro_f1(predictions, answers)
    assert score.low < score.value < score.high
    assert 0.05 < score.high - score.low < 0.25
    one = macro_f1(predictions, answers, contexts=[3] * 200)
    assert (one.low, one.high, one.contexts) == (pytest.approx(one.value), pytest.approx(one.value), 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: answer_f1("x", []), "answers must be a list of at least one gold answer"),
        (lambda: answer_f1("x", "x"), "answers must be a list of at least one gold answer"),
        (lambda: answer_exact_match("x", ["x"], "mine"), "protocol must be one of official, released"),
        (lambda: label_match("x", "x", "mine"), "protocol must be one of official, released"),
        (lambda: best_option([], []), "at least one option"),
        (lambda: best_option([1.0], [0]), "at least one token"),
        (lambda: best_option([1.0], [1, 2]), "numbers of tokens"),
        (lambda: mean_score([]), "at least one score"),
        (lambda: mean_score([1.0], [1, 2]), "1 scores and 2 contexts"),
        (lambda: macro_f1([], []), "at least one, but they are 0 and 0"),
        (lambda: macro_f1(["a"], []), "they are 1 and 0"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
