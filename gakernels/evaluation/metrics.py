"""Scores of answers: SQuAD's F1 and exact match, accuracy, macro-F1, the choice among options (docs/evaluation.md).

The samples of a method give its score, those of two methods a comparison, with intervals over contexts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from gakernels.bootstrap import interval
from gakernels.errors import InputError

PROTOCOLS = ("official", "released")
PERPLEXITY = "perplexity"  # metrics with this ending are e to the power of the mean
_LARGEST = 700.0  # e^700 is about the largest float64

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Score:
    """A mean, or a similar statistic, with its uncertainty.

    Attributes:
        value: between 0 and 1.
        low, high: 95% bootstrap interval, resampling contexts; of zero width if there is only one context.
        count: number of questions.
        contexts: number of contexts that they are about.
    """

    value: float
    low: float
    high: float
    count: int
    contexts: int

    def to_dict(self) -> dict[str, float]:
        """Plain JSON types."""
        return asdict(self)


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
    _check_protocol(protocol)
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
    _check_protocol(protocol)
    if isinstance(answers, str) or not answers:
        raise InputError(f"answers must be a list of at least one gold answer, but it is {answers!r}")
    return answers if protocol == "official" else [released_answer(answers)]


def _is_blank_for_released(prediction: str, answers: Sequence[str], protocol: str) -> bool:
    texts = [prediction, *_gold(answers, protocol)]
    return protocol == "released" and not all(text.translate(_NO_PUNCTUATION).strip() for text in texts)


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}, but it is {protocol!r}")


# Many answers


def macro_f1(predictions: Sequence[str], answers: Sequence[str], gold_labels_only: bool = False) -> float:
    """The mean over labels of the F1 score of each.

    Args:
        predictions: a label for each question.
        answers: the gold label of each.
        gold_labels_only: average over the labels that occur in the answers, as MetaICL does; otherwise also over those
            that occur in predictions only, with an F1 of 0, as scikit-learn does.

    Raises:
        InputError: there is no question, or the lengths differ.
    """
    if len(predictions) != len(answers) or not answers:
        raise InputError(
            f"predictions must be as many as answers, at least one, but they are {len(predictions)} and {len(answers)}"
        )
    given, gold = Counter(predictions), Counter(answers)
    right = Counter(answer for prediction, answer in zip(predictions, answers, strict=True) if prediction == answer)
    labels = gold if gold_labels_only else gold | given
    return sum(2 * right[label] / (given[label] + gold[label]) for label in sorted(labels)) / len(labels)


@dataclass(frozen=True)
class Sample:
    """What one question (or window, or task) adds to a metric: the sum of totals over the sum of weights.

    Attributes:
        context: number of its context; contexts are resampled.
        total: a score, or a loss in nats.
        weight: 1, or the number of tokens.
    """

    context: int
    total: float
    weight: float = 1.0


Samples = Mapping[Hashable, Sample]


@dataclass(frozen=True)
class Comparison:
    """One method compared with another on the same questions, paired, with the 95% bootstrap interval.

    Attributes:
        value: difference of the scores; for perplexities, their ratio.
        low, high: the interval; of zero width if there is only one context.
    """

    value: float
    low: float
    high: float


def score(metric: str, samples: Samples) -> Score:
    """The value of a metric over at least one sample."""
    sums = _sums([list(samples.values())])

    def statistic(total: Tensor) -> Tensor:
        return _value(metric, total)

    low, high = interval(sums, statistic)
    total = sums.sum(0, keepdim=True)
    return Score(float(statistic(total)), low, high, int(total[0, 1]), len(sums))


def compare(metric: str, first: Samples, second: Samples) -> Comparison | None:
    """First minus second (for perplexities, first over second) on the samples of both; None if they share none."""
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
    """(contexts, 2 per part): the totals and weights of each part, by context."""
    order, rows = torch.unique(torch.tensor([sample.context for sample in parts[0]]), return_inverse=True)
    columns = [[getattr(sample, name) for sample in part] for part in parts for name in ("total", "weight")]
    values = torch.tensor(columns, dtype=torch.float64).mT
    return torch.zeros(len(order), values.shape[1], dtype=torch.float64).index_add_(0, rows, values)
