"""From samples to scores: means and perplexities, and how two methods compare, with intervals over contexts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gakernels.bootstrap import interval
from gakernels.evaluation.metrics import Score

PERPLEXITY = "perplexity"  # metrics whose name ends so are e to the power of the mean
_LARGEST = 700.0  # e^700 is about the largest number there is


@dataclass(frozen=True)
class Sample:
    """What one question (or window, or task) adds to a metric, which is the sum of totals over that of weights.

    Attributes:
        context: number of the context it is about, which is what is resampled.
        total: a score, or a loss in nats.
        weight: 1, or the number of tokens.
    """

    context: int
    total: float
    weight: float = 1.0


Samples = Mapping[Hashable, Sample]


@dataclass(frozen=True)
class Comparison:
    """One method against another on the same questions, paired, with its 95% bootstrap interval.

    Attributes:
        value: difference of the scores; of perplexities their ratio.
        low, high: the interval; of no width where there is only one context.
    """

    value: float
    low: float
    high: float


def score(metric: str, samples: Samples) -> Score:
    """The value of a metric from at least one sample."""
    sums = _sums([list(samples.values())])

    def statistic(total: Tensor) -> Tensor:
        return _value(metric, total[:, :2])

    low, high = interval(sums, statistic)
    value = float(statistic(sums.sum(0, keepdim=True)))
    count = round(sum(sample.weight for sample in samples.values()))
    return Score(value, low, high, count, len(sums))


def compare(metric: str, first: Samples, second: Samples) -> Comparison | None:
    """First minus second (of perplexities: first over second) on what both have; None where that is nothing."""
    common = [key for key in first if key in second]
    if not common:
        return None
    sums = _sums([[first[key] for key in common], [second[key] for key in common]])

    def statistic(total: Tensor) -> Tensor:
        values = [_value(metric, total[:, :2]), _value(metric, total[:, 2:])]
        return values[0] / values[1] if metric.endswith(PERPLEXITY) else values[0] - values[1]

    low, high = interval(sums, statistic)
    return Comparison(float(statistic(sums.sum(0, keepdim=True))), low, high)


def _value(metric: str, total: Tensor) -> Tensor:
    mean = total[:, 0] / total[:, 1]
    return mean.clamp(max=_LARGEST).exp() if metric.endswith(PERPLEXITY) else mean


def _sums(parts: Sequence[Sequence[Sample]]) -> Tensor:
    """(contexts, 2 a part): the totals and weights of each part, by context."""
    numbers = torch.tensor([sample.context for sample in parts[0]])
    order, rows = torch.unique(numbers, return_inverse=True)
    columns = [[getattr(sample, name) for sample in part] for part in parts for name in ("total", "weight")]
    values = torch.tensor(columns, dtype=torch.float64).mT
    return torch.zeros(len(order), values.shape[1], dtype=torch.float64).index_add_(0, rows, values)
