"""Scores of answers, against the official scripts' own wording, scikit-learn's numbers, and plain loops."""

import math
import random
import string
from collections import defaultdict
from collections.abc import Iterable

import pytest
import torch

from gakernels.errors import InputError
from gakernels.evaluation.metrics import (
    Estimate,
    Sample,
    answer_exact_match,
    answer_f1,
    best_option,
    compare,
    label_match,
    label_samples,
    normalize_answer,
    released_answer,
    score,
    value,
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


def scored(values: list[float], contexts: list[int] | None = None) -> Estimate:
    """The mean of values, each about a context of its own where none are named."""
    places = contexts or range(len(values))
    return score(
        "match", {n: Sample(place, value) for n, (place, value) in enumerate(zip(places, values, strict=True))}
    )


def drawn_labels(draw: random.Random) -> tuple[list[str], list[str]]:
    labels = list("abcdef"[: draw.randint(1, 6)])
    count = draw.randint(1, 30)
    answers = draw.choices(labels, k=count)
    return [draw.choice([answer, *labels, "other"]) for answer in answers], answers


def macro_f1(predictions: list[str], answers: list[str], labels: Iterable[str] | None = None) -> float:
    """Over the labels that occur in answers, unless others are named."""
    found = [
        label_samples(number, *pair, labels or dict.fromkeys(answers))
        for number, pair in enumerate(zip(predictions, answers, strict=True))
    ]
    samples = {(number, label): sample for number, each in enumerate(found) for label, sample in each.items()}
    scored = score("ranking_macro_f1", samples)
    assert scored.value == value("ranking_macro_f1", samples)
    assert (scored.count, scored.clusters) == (len(answers), len(answers))
    return scored.value


def test_macro_f1_over_gold_labels_is_metaicls(draw: random.Random) -> None:
    for _ in range(20):
        predictions, answers = drawn_labels(draw)
        assert macro_f1(predictions, answers) == pytest.approx(metaicl_macro_f1(predictions, answers), abs=1e-12)


def test_macro_f1_is_scikit_learns(draw: random.Random) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    for _ in range(20):
        predictions, answers = drawn_labels(draw)
        wanted = sklearn.f1_score(answers, predictions, average="macro", zero_division=0)
        labels = dict.fromkeys(answers + predictions)
        assert macro_f1(predictions, answers, labels) == pytest.approx(wanted, abs=1e-12)
        hits = [label_match(*pair) for pair in zip(predictions, answers, strict=True)]
        assert scored(hits).value == pytest.approx(sklearn.accuracy_score(answers, predictions), abs=1e-12)


def test_macro_f1_worked_out_by_hand() -> None:
    # a: 2 right of 2 given and 3 gold: F1 0.8; b: 1 right of 2 given and 2 gold: F1 0.5; c is only given: 0.
    predictions, answers = ["a", "a", "b", "b", "c"], ["a", "a", "a", "b", "b"]
    assert macro_f1(predictions, answers, "abc") == pytest.approx((0.8 + 0.5 + 0) / 3)
    assert macro_f1(predictions, answers) == pytest.approx((0.8 + 0.5) / 2)


def test_a_mean_counts_questions_and_contexts(draw: random.Random) -> None:
    scores = [draw.random() for _ in range(50)]
    contexts = [draw.randrange(7) for _ in scores]
    found = scored(scores, contexts)
    assert found.value == pytest.approx(sum(scores) / 50)
    assert (found.count, found.clusters) == (50, len(set(contexts)))
    assert found.low < found.value < found.high
    assert scored(scores, contexts) == found


def test_the_interval_is_the_normal_one_for_many_questions(draw: random.Random) -> None:
    scores = [float(draw.random() < 0.3) for _ in range(900)]
    found = scored(scores)
    deviation = math.sqrt(found.value * (1 - found.value) / 900)
    # 10,000 resamples place a quantile to 2.7 hundredths of a standard deviation.
    assert found.high - found.value == pytest.approx(1.96 * deviation, abs=0.16 * deviation)
    assert found.value - found.low == pytest.approx(1.96 * deviation, abs=0.16 * deviation)


def test_questions_of_one_context_are_not_independent() -> None:
    contexts = [number // 10 for number in range(400)]
    together = [float(context % 2) for context in contexts]
    apart, clustered = scored(together), scored(together, contexts)
    # 40 contexts instead of 400 questions: wider by the square root of ten.
    assert (clustered.high - clustered.low) / (apart.high - apart.low) == pytest.approx(10**0.5, rel=0.15)


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
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


# Samples


def drawn_samples(draw: random.Random, weights: bool = False) -> dict[int, Sample]:
    return {
        key: Sample(draw.randrange(12), draw.uniform(0, 3), draw.randint(1, 9) if weights else 1.0) for key in range(80)
    }


def test_a_perplexity_is_e_to_the_mean_over_tokens(draw: random.Random) -> None:
    samples = drawn_samples(draw, weights=True)
    found = score("completion_perplexity", samples)
    total, weight = (sum(getattr(sample, name) for sample in samples.values()) for name in ("total", "weight"))
    assert found.value == pytest.approx(math.exp(total / weight))
    assert found.low < found.value < found.high
    assert (found.count, found.clusters) == (weight, len({sample.cluster for sample in samples.values()}))


def test_a_perplexity_beyond_all_numbers_is_a_number() -> None:
    assert math.isfinite(score("perplexity", {0: Sample(0, 1e6)}).value)


@pytest.mark.parametrize("metric", ["f1", "perplexity"])
def test_a_comparison_is_of_what_both_have(draw: random.Random, metric: str) -> None:
    first, second = drawn_samples(draw, weights=True), drawn_samples(draw, weights=True)
    second = {key: Sample(first[key].cluster, sample.total, sample.weight) for key, sample in second.items()}
    one = {key: first[key] for key in range(60)}
    two = {key: second[key] for key in range(20, 80)}
    found = compare(metric, one, two)
    assert found is not None
    values = [score(metric, {key: part[key] for key in range(20, 60)}).value for part in (first, second)]
    expected = values[0] / values[1] if metric == "perplexity" else values[0] - values[1]
    assert found.value == pytest.approx(expected)
    assert found.low <= found.value <= found.high
    assert compare(metric, one, {}) is None


def test_what_is_the_same_everywhere_has_no_interval(draw: random.Random) -> None:
    """Contexts that are all alike do not tell how much others would differ."""
    first = drawn_samples(draw)
    second = {key: Sample(sample.cluster, sample.total - 0.25) for key, sample in first.items()}
    difference, ratio = compare("f1", first, second), compare("perplexity", first, second)
    half = score("f1", {key: Sample(sample.cluster, 0.5) for key, sample in first.items()})
    for found, expected in ((difference, 0.25), (ratio, math.exp(0.25)), (half, 0.5)):
        assert found is not None
        assert found.value == pytest.approx(expected)
        assert (found.low, found.high, found.clusters) == (None, None, half.clusters)


@pytest.mark.parametrize("clusters", [2, 7, 100])
def test_where_all_are_right_or_all_wrong_the_interval_is_the_exact_one(clusters: int) -> None:
    exact = pytest.importorskip("scipy.stats").binomtest
    for right in (0, 1):
        found = score("match", {number: Sample(number, float(right)) for number in range(clusters)})
        wanted = exact(right * clusters, clusters).proportion_ci(0.95)
        assert (found.value, found.low, found.high) == pytest.approx((right, wanted.low, wanted.high))


def test_a_macro_f1_of_right_labels_alone_has_no_exact_interval() -> None:
    parts = [label_samples(number, label, label, "ab") for number, label in enumerate("abab")]
    samples = {(number, label): sample for number, part in enumerate(parts) for label, sample in part.items()}
    found = score("macro_f1", samples)
    assert (found.value, found.low, found.high, found.clusters) == (1.0, None, None, 4)


@pytest.mark.parametrize("metric", ["f1", "perplexity"])
def test_one_context_has_no_interval(draw: random.Random, metric: str) -> None:
    samples = {key: Sample(7, draw.random()) for key in range(9)}
    others = {key: Sample(7, draw.random()) for key in range(9)}
    for found in (score(metric, samples), compare(metric, samples, others)):
        assert found is not None
        assert (found.low, found.high, found.count, found.clusters) == (None, None, 9, 1)
    assert score(metric, samples).value == value(metric, samples)


def test_seeds_of_an_item_are_not_items_of_their_own(draw: random.Random) -> None:
    """Under five seeds that all say the same, an interval is as wide as under one of them."""
    hits = [float(draw.random() < 0.4) for _ in range(150)]
    one = score("match", {item: Sample(item, hit) for item, hit in enumerate(hits)})
    five = {(seed, item): Sample(item, hit, group=seed) for item, hit in enumerate(hits) for seed in range(5)}
    found = score("match", five)
    assert (found.value, found.low, found.high) == pytest.approx((one.value, one.low, one.high))
    assert (found.count, found.clusters) == (750, 150)
    apart = score("match", {key: Sample(number, sample.total) for number, (key, sample) in enumerate(five.items())})
    assert apart.low is not None
    assert apart.high is not None
    assert (one.high - one.low) / (apart.high - apart.low) == pytest.approx(5**0.5, rel=0.1)


def test_a_mean_over_seeds_gives_each_seed_the_same_weight() -> None:
    samples = {0: Sample(0, 1.0, group=13), 1: Sample(1, 0.0, group=13), 2: Sample(1, 1.0, group=21)}
    assert value("match", samples) == (0.5 + 1) / 2
    # The draws of two items are 00, 01, 10, 11; without item 1 nothing is left of seed 21, which then does not count.
    found = score("match", samples)
    assert (found.low, found.high) == (0.5, 1)


def test_the_bootstrap_of_a_comparison_is_that_of_its_differences(draw: random.Random) -> None:
    """Worked out another way: contexts of equal size, so that the difference is the mean of differences."""
    first, second = ({n: Sample(n // 4, draw.random()) for n in range(120)} for _ in range(2))
    found = compare("f1", first, second)
    differences = {n: Sample(n // 4, first[n].total - second[n].total) for n in range(120)}
    wanted = score("f1", differences)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
    assert found.clusters == 30
