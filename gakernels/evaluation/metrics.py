"""Scores of answers: SQuAD's F1 and exact match, accuracy, macro-F1, the choice among options (docs/evaluation.md).

The samples of a method give its score, those of two methods a comparison, with intervals over clusters of samples.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gakernels.bootstrap import interval
from gakernels.errors import InputError, check_known

PROTOCOLS = ("official", "released")
PERPLEXITY = "perplexity"  # metrics with this ending are e to the power of the mean
_LARGEST = 700.0  # e^700 is about the largest float64

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


# One answer


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces: as in SQuAD's evaluation script (v1.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def answer_f1(prediction: str, answers: Sequence[str], protocol: str = "official") -> float:
    """Overlap of the words of a prediction and a gold answer: the harmonic mean of precision and recall.

    Args:
        prediction: the model's answer.
        answers: gold answers, at least one.
        protocol: `official`: the best over all gold answers; `released`: over one of them (`released_answer`), and 0
            if prediction or answer consists of punctuation only.

    Raises:
        InputError: there is no gold answer, or no such protocol.
    """
    if _is_blank_for_released(prediction, answers, protocol):
        return 0.0
    return max(_f1(prediction, answer) for answer in _gold(answers, protocol))


def answer_exact_match(prediction: str, answers: Sequence[str], protocol: str = "official") -> float:
    """1 if a prediction equals a gold answer after `normalize_answer`, else 0; otherwise as `answer_f1`."""
    if _is_blank_for_released(prediction, answers, protocol):
        return 0.0
    return max(float(normalize_answer(prediction) == normalize_answer(answer)) for answer in _gold(answers, protocol))


def released_answer(answers: Sequence[str]) -> str:
    """The one gold answer that the authors' released code compares with: the first of the shortest, first letter in
    upper case."""
    shortest = min(answers, key=len).strip()
    return shortest[:1].upper() + shortest[1:]


def label_match(prediction: str, answer: str, protocol: str = "official") -> float:
    """1 if a generated label is the gold one, else 0.

    Args:
        prediction: the model's answer.
        answer: the gold label.
        protocol: `official` (MetaICL): equal up to surrounding space; `released`: ignoring case as well, after
            removing every "Output:" from the prediction.

    Raises:
        InputError: there is no such protocol.
    """
    check_known("protocol", protocol, PROTOCOLS)
    if protocol == "released":
        prediction, answer = prediction.replace("Output:", "").lower(), answer.lower()
    return float(prediction.strip() == answer.strip())


def best_option(losses: Sequence[float], tokens: Sequence[int]) -> int:
    """The option that the model prefers: the least loss per token, the first of equals (as in MetaICL).

    Args:
        losses: summed negative log-likelihood of each option, in nats.
        tokens: number of tokens of each, at least 1.

    Raises:
        InputError: there is no option, the lengths differ, or an option has no token.
    """
    if not losses or len(losses) != len(tokens) or min(tokens) < 1:
        raise InputError(
            f"there must be at least one option, each with a loss and at least one token, but the losses are {losses} "
            f"and the numbers of tokens {tokens}"
        )
    return min(range(len(losses)), key=lambda option: losses[option] / tokens[option])


def _f1(prediction: str, answer: str) -> float:
    predicted, wanted = (Counter(normalize_answer(text).split()) for text in (prediction, answer))
    common = (predicted & wanted).total()
    return 2 * common / (predicted.total() + wanted.total()) if common else 0.0


def _gold(answers: Sequence[str], protocol: str) -> Sequence[str]:
    check_known("protocol", protocol, PROTOCOLS)
    if isinstance(answers, str) or not answers:
        raise InputError(f"answers must be a list of at least one gold answer, but it is {answers!r}")
    return answers if protocol == "official" else [released_answer(answers)]


def _is_blank_for_released(prediction: str, answers: Sequence[str], protocol: str) -> bool:
    texts = [prediction, *_gold(answers, protocol)]
    return protocol == "released" and not all(text.translate(_NO_PUNCTUATION).strip() for text in texts)


# Many answers


@dataclass(frozen=True)
class Sample:
    """What one question (or window, or task) adds to a metric, which is the sum of totals over the sum of weights.

    Attributes:
        cluster: number of what it belongs to (its context; in `icl` its item, or its task); clusters are resampled.
        total: a score, or a loss in nats.
        weight: 1, or the number of tokens.
        group: seed of a draw, or label of a macro-F1; a metric is the mean over groups, which are not resampled.
        count: what it adds to the number of answers; None for its weight.
    """

    cluster: int
    total: float
    weight: float = 1.0
    group: Hashable = None
    count: float | None = None


Samples = Mapping[Hashable, Sample]


def label_samples(
    cluster: int, prediction: str, answer: str, labels: Iterable[str], seed: Hashable = None
) -> dict[Hashable, Sample]:
    """What one answer adds to the macro-F1, by label: the mean over labels (and seeds) of the F1 of each.

    The F1 of a label is the number of right answers over the mean of the numbers predicted and wanted.

    Args:
        cluster: of the samples.
        prediction: the label given.
        answer: the gold label.
        labels: over which the macro-F1 is the mean: those that occur in answers (as MetaICL counts), or also those that
            occur in predictions only (as scikit-learn counts).
        seed: of the draw that the answer belongs to.
    """
    return {
        label: Sample(
            cluster,
            total=float(prediction == answer == label),
            weight=((prediction == label) + (answer == label)) / 2,
            group=(seed, label),
            count=float(answer == label),
        )
        for label in labels
    }


@dataclass(frozen=True)
class Estimate:
    """A score of a method, or a comparison of two, with its uncertainty.

    Attributes:
        value: a score between 0 and 1, or a perplexity; of two methods the difference, of perplexities the ratio.
        low, high: 95% bootstrap interval, resampling clusters; where all clusters of a single group score 0, or all 1,
            the exact one (Clopper and Pearson 1934). None if there is one cluster, or if all are alike otherwise: such
            clusters do not tell how much others would differ.
        count: number of answers, or tokens for a perplexity.
        clusters: number of clusters.
    """

    value: float
    low: float | None
    high: float | None
    count: int
    clusters: int


def value(metric: str, samples: Samples) -> float:
    """The value of a metric over at least one sample."""
    return float(_value(metric, _sums([samples]).sum(0, keepdim=True)))


def score(metric: str, samples: Samples) -> Estimate:
    """The value of a metric over at least one sample, with its interval."""
    found = _estimate([samples], lambda sums: _value(metric, sums))
    is_mean = not metric.endswith(PERPLEXITY) and len({sample.group for sample in samples.values()}) == 1
    if found.low is not None or found.clusters < 2 or found.value not in (0, 1) or not is_mean:
        return found
    other = 1 - 0.025 ** (1 / found.clusters)  # so many of the others could score differently
    return replace(found, low=0.0, high=other) if found.value == 0 else replace(found, low=1 - other, high=1.0)


def compare(metric: str, first: Samples, second: Samples) -> Estimate | None:
    """First minus second (for perplexities, first over second) on the samples of both; None if they share none.

    It is paired: the clusters are drawn for both together.
    """
    common = [key for key in first if key in second]
    if not common:
        return None

    def statistic(sums: Tensor) -> Tensor:
        one, other = (_value(metric, half) for half in sums.chunk(2, dim=1))
        return one / other if metric.endswith(PERPLEXITY) else one - other

    return _estimate([{key: samples[key] for key in common} for samples in (first, second)], statistic)


def _estimate(parts: Sequence[Samples], statistic: Callable[[Tensor], Tensor]) -> Estimate:
    sums = _sums(parts)
    found = float(statistic(sums.sum(0, keepdim=True)))
    low, high = interval(sums, statistic)
    has_width = high - low > 1e-12 * max(abs(found), 1.0)
    count = sum(sample.weight if sample.count is None else sample.count for sample in parts[0].values())
    return Estimate(found, low if has_width else None, high if has_width else None, round(count), len(sums))


def _value(metric: str, sums: Tensor) -> Tensor:
    """(n,) values from (n, 2 groups) totals and weights; groups of which nothing was drawn do not count."""
    totals, weights = sums.chunk(2, dim=1)
    mean = (totals / weights).nanmean(1)
    return mean.clamp(max=_LARGEST).exp() if metric.endswith(PERPLEXITY) else mean


def _sums(parts: Sequence[Samples]) -> Tensor:
    """(clusters, 2 groups per part): totals and weights of each group, by cluster. All parts have the same keys."""
    clusters = _numbered(sample.cluster for sample in parts[0].values())
    groups = _numbered(sample.group for sample in parts[0].values())
    sums = torch.zeros(len(clusters), 2 * len(parts), len(groups), dtype=torch.float64)
    rows = torch.tensor([clusters[sample.cluster] for sample in parts[0].values()])
    columns = torch.tensor([groups[sample.group] for sample in parts[0].values()])
    for number, part in enumerate(parts):
        for place, name in enumerate(("total", "weight")):
            values = torch.tensor([getattr(sample, name) for sample in part.values()], dtype=torch.float64)
            sums[:, 2 * number + place].index_put_((rows, columns), values, accumulate=True)
    return sums.flatten(1)


def _numbered(names: Iterable[Hashable]) -> dict[Hashable, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}
