"""BM25 against its definition, and what words and passages are."""

import math
import sys
from collections.abc import Callable
from random import Random

import pytest
import torch
from worlds import make, run, scenario

from gakernels import InputError
from gakernels.evaluation.retrieval import PassageSearch, passages

pytest.importorskip("bm25s")


@pytest.fixture
def random(generator: torch.Generator) -> Random:
    return Random(generator.initial_seed())


def texts_of(random: Random, count: int) -> list[str]:
    words = [f"w{number}" for number in range(30)]
    return [" ".join(random.choices(words, k=random.randint(3, 40))) for _ in range(count)]


def defined(texts: list[str], query: str) -> list[float]:
    """Robertson and Zaragoza's formula, word for word."""
    split, k, b = [text.split() for text in texts], 1.5, 0.75
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
    query = " ".join([*texts_of(random, 1), "unknown"])
    assert PassageSearch(texts).scores(query) == pytest.approx(defined(texts, query), rel=1e-12)


def test_scores_computed_by_hand() -> None:
    # "a" is in both passages, n = 2: ln(1 + 0.5 / 2.5); "b" in the first, n = 1: ln(1 + 1.5 / 1.5). Lengths 3 and 1.
    first, second = PassageSearch(["a b b", "a"]).scores("b a")
    assert first == pytest.approx(
        math.log(1.2) * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 1.5)) + math.log(2) * 5 / (2 + 2.0625)
    )
    assert second == pytest.approx(0.18232155679395 * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 0.5)))


def test_words_are_found_without_regard_to_case_and_punctuation() -> None:
    index = PassageSearch(["The capital of France is Paris.", "Berlin, in Germany", "Rome"])
    assert index.best("what is the CAPITAL of france?") == ["The capital of France is Paris."]
    assert index.best("germany") == ["Berlin, in Germany"]


def test_the_best_stand_in_the_order_of_the_text() -> None:
    index = PassageSearch(["b", "a a", "c", "a"])
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
    index: Callable[[str], list[float]] = PassageSearch(["...", "--"]).scores
    assert index("...") == [0.0, 0.0]


def test_without_bm25s_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"retrieval needs the package bm25s: pip install 'gakernels\[eval\]'"):
        run(make(), scenario(1), "closed_book", "retrieval")
