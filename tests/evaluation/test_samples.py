"""Scores and comparisons of samples."""

import math
from random import Random

import pytest
import torch

from gakernels.evaluation.metrics import Sample, compare, mean_score, score


@pytest.fixture
def random(generator: torch.Generator) -> Random:
    return Random(generator.initial_seed())


def drawn(random: Random, weights: bool = False) -> dict[int, Sample]:
    return {
        key: Sample(random.randrange(12), random.uniform(0, 3), random.randint(1, 9) if weights else 1.0)
        for key in range(80)
    }


def test_a_mean_is_that_of_mean_score(random: Random) -> None:
    samples = drawn(random)
    contexts = [sample.context for sample in samples.values()]
    assert score("f1", samples) == mean_score([sample.total for sample in samples.values()], contexts)


def test_a_perplexity_is_e_to_the_mean_over_tokens(random: Random) -> None:
    samples = drawn(random, weights=True)
    found = score("completion_perplexity", samples)
    total, weight = (sum(getattr(sample, name) for sample in samples.values()) for name in ("total", "weight"))
    assert found.value == pytest.approx(math.exp(total / weight))
    assert found.low < found.value < found.high
    assert (found.count, found.contexts) == (weight, len({sample.context for sample in samples.values()}))


def test_a_perplexity_beyond_all_numbers_is_a_number() -> None:
    assert math.isfinite(score("perplexity", {0: Sample(0, 1e6)}).value)


@pytest.mark.parametrize("metric", ["f1", "perplexity"])
def test_a_comparison_is_of_what_both_have(random: Random, metric: str) -> None:
    first, second = drawn(random, weights=True), drawn(random, weights=True)
    second = {key: Sample(first[key].context, sample.total, sample.weight) for key, sample in second.items()}
    one = {key: first[key] for key in range(60)}
    two = {key: second[key] for key in range(20, 80)}
    found = compare(metric, one, two)
    assert found is not None
    values = [score(metric, {key: part[key] for key in range(20, 60)}).value for part in (first, second)]
    expected = values[0] / values[1] if metric == "perplexity" else values[0] - values[1]
    assert found.value == pytest.approx(expected)
    assert found.low <= found.value <= found.high
    assert compare(metric, one, {}) is None


def test_what_differs_by_the_same_everywhere_differs_for_certain(random: Random) -> None:
    first = drawn(random)
    second = {key: Sample(sample.context, sample.total - 0.25) for key, sample in first.items()}
    found = compare("f1", first, second)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    ratio = compare("perplexity", first, second)
    assert ratio is not None
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(0.25), math.exp(0.25)))


def test_intervals_hold_the_truth_as_often_as_they_say(random: Random) -> None:
    """Contexts with scores of their own: an interval over questions would be far too narrow."""
    holds = 0
    for _ in range(100):
        samples = {}
        for context in range(40):
            level = random.gauss(0.5, 0.2)
            samples |= {(context, n): Sample(context, level) for n in range(5)}
        found = score("f1", samples)
        holds += found.low <= 0.5 <= found.high
    assert holds >= 80  # about 94 are expected, give or take 2.4
