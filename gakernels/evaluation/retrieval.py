"""Methods that search the context for the passages that a question needs: by BM25, or by an embedding model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from gakernels.errors import InputError, first_line
from gakernels.evaluation.methods import Method, MethodSettings, Prepared
from gakernels.evaluation.scenarios import EvaluationCase, Scenario
from gakernels.model import GenerativeAdapter

_WORD = re.compile(r"\w+")

Ranking = TypeVar("Ranking", bound="PassageRanking")


def passages(text: str, words: int = 100) -> list[str]:
    """A text in pieces of so many words, the last one shorter; white space becomes a single space."""
    split = text.split()
    return [" ".join(split[start : start + words]) for start in range(0, len(split), words)]


class PassageRanking(ABC):
    """Ranks passages.

    Args:
        texts: the passages, at least one.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    @abstractmethod
    def scores(self, query: str) -> list[float]:
        """The score of every passage."""

    def best(self, query: str, count: int = 1) -> list[str]:
        """The best passages, in the order of the text; the earlier one of equals."""
        scores = self.scores(query)
        ranked = sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:count]
        return [self._texts[number] for number in sorted(ranked)]


class PassageSearch(PassageRanking):
    """Ranks passages by the words they share with a query: BM25 with k1 1.5 and b 0.75, through bm25s.

    The score of a passage is the sum over the query's words of ln(1 + (N - n + 0.5) / (n + 0.5)) f (k1 + 1) / (f + k1
    (1 - b + b l / mean l)), with N passages, n of which have the word, f times in this one of l words. Words are runs
    of letters, digits and underscores, ignoring case; there are no stop words and no stemming.

    Args:
        texts: the passages, at least one.

    Raises:
        InputError: bm25s is not installed.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__(texts)
        self._index = _bm25s().BM25(k1=1.5, b=0.75, method="atire", idf_method="lucene", dtype="float64")
        with np.errstate(invalid="ignore"):  # 0 / 0 if no passage has a word
            self._index.index([_words(text) for text in texts], create_empty_token=False, show_progress=False)

    def scores(self, query: str) -> list[float]:
        """The score of every passage."""
        known = self._index.get_tokens_ids(_words(query))
        return self._index.get_scores_from_ids(known).tolist() if known else [0.0] * len(self._texts)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise InputError("retrieval needs the package bm25s: pip install 'gakernels[eval]'") from error
    return bm25s


class EmbeddingSearch(PassageRanking):
    """Ranks passages by the similarity (the embedding model's own; usually the cosine) of their vectors to a query's.

    Args:
        texts: the passages, at least one.
        model: a SentenceTransformer.

    Attributes:
        vectors: (passages, d) float32.
    """

    def __init__(self, texts: Sequence[str], model: Any) -> None:
        super().__init__(texts)
        self._model = model
        self.vectors: Tensor = model.encode_document(list(texts), convert_to_tensor=True, show_progress_bar=False)

    def scores(self, query: str) -> list[float]:
        """The score of every passage."""
        asked = self._model.encode_query([query], convert_to_tensor=True, show_progress_bar=False)
        return self._model.similarity(asked, self.vectors)[0].tolist()


class Retrieval(Method):
    """BM25 over passages of 100 words; the best ones are put before the question, in the order of the text.

    Raises:
        InputError: bm25s is not installed.
    """

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings)
        _bm25s()

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Indexes the passages of each context."""
        texts = [case.context.text for case in cases]
        return Prepared([None] * len(cases), self.retriever(cases), kept=texts)

    def retriever(self, cases: Sequence[EvaluationCase]) -> Callable[[int, str], str]:
        """A function from the number of a case in this list and a query to the retrieved text."""
        return _finder([case.context.text for case in cases], PassageSearch, self.settings)[0]


class EmbeddingRetrieval(Method):
    """As `Retrieval`, with passages ranked by an embedding model of sentence-transformers; their vectors are kept.

    Raises:
        InputError: no model is named or it can't be loaded, or sentence-transformers is not installed.
    """

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings)
        self._embedder = _embedder(settings.embedding_model, str(model.device))

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Embeds the passages of each context."""
        texts = [case.context.text for case in cases]
        find, rankings = _finder(texts, lambda pieces: EmbeddingSearch(pieces, self._embedder), self.settings)
        return Prepared([None] * len(cases), find, kept=[*texts, *(rankings[text].vectors for text in texts)])


def _finder(
    texts: Sequence[str], rank: Callable[[Sequence[str]], Ranking], settings: MethodSettings
) -> tuple[Callable[[int, str], str], dict[str, Ranking]]:
    """A function from the number of a text and a query to the retrieved passages, and the index of each text."""
    rankings = {text: rank(passages(text, settings.passage_words)) for text in dict.fromkeys(texts)}

    def find(number: int, query: str) -> str:
        return "\n\n".join(rankings[texts[number]].best(query, settings.passages))

    return find, rankings


def _embedder(name: str | None, device: str) -> Any:
    """An embedding model, with the pooling, prompts and similarity that its folder or repository names.

    Raises:
        InputError: no model is named or it can't be loaded, or sentence-transformers is not installed.
    """
    if name is None:
        raise InputError("retrieval_embedding needs an embedding model; name one with --embedding-model")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(
            "retrieval_embedding needs the package sentence-transformers: pip install 'gakernels[embedding]'"
        ) from error
    try:
        return SentenceTransformer(name, device=device)
    except (OSError, ValueError) as error:
        raise InputError(f"--embedding-model: {name!r} can't be loaded: {first_line(error)}") from error
