"""BM25 against its definition and a maintained implementation."""

import math
from collections.abc import Callable
from random import Random

import pytest
import torch

from gakernels.evaluation.bm25 import Bm25, passages


@pytest.fixture
def random(generator: torch.Generator) -> Random:
    return Random(generator.initial_seed())


def texts_of(random: Random, count: int) -> list[str]:
    words = [f"w{number}" for number in range(30)]
    return [" ".join(random.choices(words, k=random.randint(3, 40))) for _ in range(count)]


def defined(texts: list[str], query: str, k: float, b: float) -> list[float]:
    """Robertson's formula, word for word."""
    split = [text.split() for text in texts]
    mean = sum(map(len, split)) / len(split)
    scores = []
    for words in split:
        score = 0.0
        for word in query.split():
            frequency = words.count(word)
            having = sum(word in other for other in split)
            weight = math.log(1 + (len(split) - having + 0.5) / (having + 0.5))
            score += weight * frequency * (k + 1) / (frequency + k * (1 - b + b * len(words) / mean))
        scores.append(score)
    return scores


def test_scores_are_those_of_the_definition(random: Random) -> None:
    texts = texts_of(random, random.randint(1, 20))
    query, k, b = " ".join(texts_of(random, 1)), random.uniform(0.5, 3), random.random()
    assert Bm25(texts, k, b).scores(query) == pytest.approx(defined(texts, query, k, b), rel=1e-12)


def test_scores_are_those_of_bm25s(random: Random) -> None:
    bm25s = pytest.importorskip("bm25s")
    texts = texts_of(random, 20)
    query = texts_of(random, 1)[0]
    theirs = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    theirs.index([text.split() for text in texts], show_progress=False)
    expected = [float(score) * (1.5 + 1) for score in theirs.get_scores(query.split())]  # Lucene leaves k + 1 out
    assert Bm25(texts).scores(query) == pytest.approx(expected, rel=1e-5)


def test_words_are_found_without_regard_to_case_and_punctuation() -> None:
    index = Bm25(["The capital of France is Paris.", "Berlin, in Germany", "Rome"])
    assert index.best("what is the CAPITAL of france?") == ["The capital of France is Paris."]
    assert index.best("germany") == ["Berlin, in Germany"]


def test_the_best_stand_in_the_order_of_the_text() -> None:
    index = Bm25(["b", "a a", "c", "a"])
    assert index.best("a", 2) == ["a a", "a"]
    assert index.best("c a", 9) == ["b", "a a", "c", "a"]
    assert index.best("unknown", 1) == ["b"]


@pytest.mark.parametrize("words", [1, 7, 100])
def test_passages_are_all_words_in_order(random: Random, words: int) -> None:
    text = "\n\n".join(texts_of(random, 8))
    pieces = passages(text, words)
    assert " ".join(pieces).split() == text.split()
    assert all(len(piece.split()) == words for piece in pieces[:-1])
    assert 1 <= len(pieces[-1].split()) <= words


def test_a_text_of_signs_alone_has_no_words() -> None:
    index: Callable[[str], list[float]] = Bm25(["...", "--"]).scores
    assert index("...") == [0.0, 0.0]
