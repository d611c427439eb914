"""The interval of a ratio of perplexities."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gakernels.bootstrap import ratio_of_perplexities


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
    expected = np.exp(np.quantile(ratios, [0.025, 0.975]))
    found = ratio_of_perplexities(first, second, tokens, resamples=10_000)
    # A quantile of n samples scatters by sqrt(q (1 - q) / n) / density: 2.7 hundredths of a standard deviation here.
    scatter = 2.7e-2 * np.std(ratios)
    assert np.abs(np.log(found) - np.log(expected)).max() < 6 * 2**0.5 * scatter


def test_it_depends_on_the_seed_alone() -> None:
    losses = drawn_losses(10)
    first = ratio_of_perplexities(*losses, resamples=300, seed=3)
    torch.rand(7)
    assert ratio_of_perplexities(*losses, resamples=300, seed=3) == first
    assert ratio_of_perplexities(*losses, resamples=300, seed=4) != first


def test_it_covers_the_truth_in_95_of_100_samples() -> None:
    truth, hits, samples = math.exp(-0.1), 0, 300
    for seed in range(samples):
        low, high = ratio_of_perplexities(*drawn_losses(60), resamples=400, seed=seed)
        hits += low < truth < high
    # Binomial with 300 draws: 0.95 +- 0.013, a percentile bootstrap of 60 contexts lacks a point or two.
    assert 0.86 < hits / samples < 1


def test_a_ratio_that_is_driven_by_few_contexts_is_uncertain() -> None:
    tokens = torch.full((40,), 100)
    second = torch.full((40,), 200.0)
    even = ratio_of_perplexities(second - 5 + torch.randn(40), second, tokens)
    one = torch.where(torch.arange(40) == int(torch.randint(40, ())), second - 200, second)
    low, high = ratio_of_perplexities(one, second, tokens)
    assert even[1] < 1
    assert low < 0.95 < high <= 1
