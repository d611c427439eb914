"""Intervals: closed forms, a plain numpy bootstrap, and how often they hold the truth."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gakernels.bootstrap import interval, ratio_of_perplexities, tail


def drawn_losses(contexts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two paired losses of contexts of different lengths, in nats."""
    tokens = torch.randint(20, 200, (contexts,))
    first = tokens * (2 + 0.3 * torch.randn(contexts))
    return first, first + tokens * (0.1 + 0.1 * torch.randn(contexts)), tokens


def test_a_constant_ratio_has_no_width() -> None:
    first, _, tokens = drawn_losses(12)
    shift = float(torch.rand(()))
    low, high = ratio_of_perplexities(first.double() + shift * tokens.double(), first.double(), tokens, resamples=200)
    assert low == pytest.approx(math.exp(shift), rel=1e-12)
    assert high == pytest.approx(math.exp(shift), rel=1e-12)


def test_it_contains_the_estimate_and_turns_over_with_the_ratio() -> None:
    first, second, tokens = drawn_losses(30)
    estimate = math.exp(float((first - second).sum() / tokens.sum()))
    low, high = ratio_of_perplexities(first, second, tokens)
    assert low < estimate < high
    assert ratio_of_perplexities(second, first, tokens) == pytest.approx((1 / high, 1 / low), rel=1e-9)


def test_it_equals_a_plain_numpy_bootstrap() -> None:
    first, second, tokens = drawn_losses(25)
    random = np.random.default_rng(int(torch.randint(10**6, ())))
    difference, count = (first - second).double().numpy(), tokens.double().numpy()
    ratios = []
    for _ in range(10_000):
        rows = random.integers(len(count), size=len(count))
        ratios.append(difference[rows].sum() / count[rows].sum())
    expected = np.exp(np.quantile(ratios, [tail(25), 1 - tail(25)]))
    found = ratio_of_perplexities(first, second, tokens, resamples=10_000)
    # A quantile of n samples scatters by sqrt(q (1 - q) / n) / density: 3.1 hundredths of a standard deviation here.
    scatter = 3.1e-2 * np.std(ratios)
    assert np.abs(np.log(found) - np.log(expected)).max() < 6 * 2**0.5 * scatter


def test_it_depends_on_the_seed_alone() -> None:
    losses = drawn_losses(10)
    first = ratio_of_perplexities(*losses, resamples=300, seed=3)
    torch.rand(7)
    assert ratio_of_perplexities(*losses, resamples=300, seed=3) == first
    assert ratio_of_perplexities(*losses, resamples=300, seed=4) != first


def test_a_ratio_that_is_driven_by_few_contexts_is_uncertain() -> None:
    tokens = torch.full((40,), 100)
    second = torch.full((40,), 200.0)
    even = ratio_of_perplexities(second - 5 + torch.randn(40), second, tokens)
    one = torch.where(torch.arange(40) == int(torch.randint(40, ())), second - 200, second)
    low, high = ratio_of_perplexities(one, second, tokens)
    assert even[1] < 1
    assert low < 0.95 < high <= 1


def mean(sums: Tensor) -> Tensor:
    return sums[:, 0] / sums[:, 1]


def test_the_share_left_out_on_either_side_is_that_of_students_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    for clusters in (5, 8, 20, 100, 10_000):
        expected = stats.norm.cdf(-math.sqrt(clusters / (clusters - 1)) * stats.t.ppf(0.975, clusters - 1))
        assert tail(clusters) == pytest.approx(expected, rel=0.03)
    assert tail(2) < tail(3) < tail(4) < 2e-4  # below the least share that 10,000 resamples can show
    assert tail(1) == 0


@pytest.mark.parametrize(("right", "clusters"), [(1, 4), (3, 10), (30, 100), (250, 400)])
def test_of_hits_it_is_a_quantile_of_the_binomial_distribution(right: int, clusters: int) -> None:
    """The number of hits in a resample of n clusters is binomial: the interval can be read off its distribution."""
    stats = pytest.importorskip("scipy.stats")
    hits = (torch.arange(clusters) < right).double()
    for seeds in (1, 5):  # of the same outcome: they change nothing
        low, high = interval(torch.stack([seeds * hits, torch.full_like(hits, seeds)], 1), mean)
        for end, level in ((low, tail(clusters)), (high, 1 - tail(clusters))):
            # A level of 10,000 resamples scatters by sqrt(level (1 - level) / 10,000); five times that on either side.
            scatter = 5 * math.sqrt(level * (1 - level) / 10_000) + 1e-4
            least, most = stats.binom.ppf(
                [max(level - scatter, 0.0), min(level + scatter, 1.0)], clusters, right / clusters
            )
            assert max(least, 0) / clusters <= end <= most / clusters


def test_two_clusters_span_their_range() -> None:
    assert interval(torch.tensor([[1.0, 4.0], [3.0, 4.0]]), mean) == (0.25, 0.75)


@pytest.mark.parametrize("clusters", [10, 40])
def test_it_holds_the_truth_in_95_of_100_samples(clusters: int) -> None:
    """Items of different difficulty, each answered under five seeds: 1,000 draws, always the same ones."""
    random = torch.Generator().manual_seed(clusters)
    hits = 0
    for seed in range(1000):
        difficulty = torch.rand(clusters, 1, generator=random)
        right = (torch.rand(clusters, 5, generator=random) < difficulty).double().sum(1)
        low, high = interval(torch.stack([right, torch.full_like(right, 5)], 1), mean, resamples=1000, seed=seed)
        hits += low <= 0.5 <= high
    assert 930 <= hits <= 970  # a plain percentile interval holds it in 919 and 938


def test_it_holds_a_ratio_in_95_of_100_samples() -> None:
    """Contexts of different lengths: 1,000 draws, always the same ones."""
    random = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(1000):
        tokens = torch.randint(20, 200, (30,), generator=random)
        second = tokens * (2 + 0.3 * torch.randn(30, generator=random))
        first = second - tokens * (0.1 + 0.1 * torch.randn(30, generator=random))
        low, high = ratio_of_perplexities(first, second, tokens, resamples=1000, seed=seed)
        hits += low <= math.exp(-0.1) <= high
    assert 930 <= hits <= 970
