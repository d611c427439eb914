"""Retrieval of passages by BM25 (Robertson and Zaragoza, 2009), for the retrieval baseline."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def passages(text: str, words: int = 100) -> list[str]:
    """A text in pieces of so many words, the last one shorter; space between words becomes a single one."""
    split = text.split()
    return [" ".join(split[start : start + words]) for start in range(0, len(split), words)]


class Bm25:
    """Ranks passages by the words that they share with a query.

    The score of a passage is the sum over the query's words of ln(1 + (N - n + 0.5) / (n + 0.5)) f (k + 1) / (f + k (1
    - b + b l / mean l)), with N passages, n of which have the word, f times in this one of l words. Words are runs of
    letters, digits and underscores, without regard to case.

    Args:
        texts: the passages, at least one.
        k: k_1, how soon more occurrences of a word stop to count.
        b: how much longer passages are held back.
    """

    def __init__(self, texts: Sequence[str], k: float = 1.5, b: float = 0.75) -> None:
        self.texts = list(texts)
        counts = [Counter(_words(text)) for text in texts]
        lengths = [count.total() for count in counts]
        mean = sum(lengths) / len(lengths) or 1.0
        spread = Counter(word for count in counts for word in count)
        self._weights: list[dict[str, float]] = [
            {
                word: math.log1p((len(texts) - spread[word] + 0.5) / (spread[word] + 0.5))
                * (occurrences * (k + 1) / (occurrences + k * (1 - b + b * length / mean)))
                for word, occurrences in count.items()
            }
            for count, length in zip(counts, lengths, strict=True)
        ]

    def scores(self, query: str) -> list[float]:
        """Of every passage."""
        words = _words(query)
        return [sum(weights.get(word, 0.0) for word in words) for weights in self._weights]

    def best(self, query: str, count: int = 1) -> list[str]:
        """The best passages, in the order in which they stand in the text; the first of equals."""
        scores = self.scores(query)
        ranked = sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:count]
        return [self.texts[number] for number in sorted(ranked)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
