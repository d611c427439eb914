"""Methods: ways of telling a model a context; here what all share, and those that only write prompts.

A context is prepared, and then requests about it are put to a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from gakernels.adapters.adapter import Adapter
from gakernels.errors import InputError
from gakernels.evaluation.scenarios import EvaluationCase, Scenario
from gakernels.generation.decoder import plan_batches
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_context

_WORD = re.compile(r"\w+")

SHARING = 4  # questions per context from which reading it once saves more than larger batches do


@dataclass(frozen=True)
class MethodSettings:
    """What some of the methods need to know.

    Attributes:
        passages: number of passages that retrieval puts before a question.
        passage_words: words in a passage.
        static_lora: file of the trained static LoRA, for the control of that name.
        learning_rate: of all fine-tuning; None for that of docs/evaluation.md.
        epochs: of all fine-tuning, at most; None for those of docs/evaluation.md.
        seed: of the order of training examples and of a LoRA's start.
        batch_tokens: most tokens read in one pass over contexts.
        chat: whether questions are a user's messages, in the tokenizer's chat template.
    """

    passages: int = 1
    passage_words: int = 100
    static_lora: Path | None = None
    learning_rate: float | None = None
    epochs: int | None = None
    seed: int = 0
    batch_tokens: int = 16_384
    chat: bool = False


@dataclass(frozen=True)
class Prepared:
    """A method's preparation of some cases.

    Attributes:
        adapters: of each case; None for the base model alone.
        in_front: from the number of a case in the list and a query to the text in front of the prompt; None for none.
        weights: puts the weights of a case in place while a block runs; None for the base model's own.
        separate: whether requests of different cases must not share a batch: each case has its own weights, or its
            requests have a long common start, which is then read once.
        kept: the adapters and texts that are stored of the contexts between questions.
    """

    adapters: Sequence[Adapter | None]
    in_front: Callable[[int, str], str | None] = lambda number, query: None
    weights: Callable[[int], AbstractContextManager[None]] | None = None
    separate: bool = False
    kept: Sequence[Adapter | str] = ()

    def kept_bytes(self) -> int:
        """The size of what is kept: adapters as they are, texts in UTF-8."""
        return sum(len(one.encode()) if isinstance(one, str) else one.bytes() for one in self.kept)


class Method(Protocol):
    """A way of telling a model a context.

    Attributes:
        adapted: whether it is asked as an adapted model is (the scenario's `adapted_prompt`).
    """

    adapted: bool

    def missing(self, case: EvaluationCase) -> str | None:
        """Why this method can't answer a case; None if it can."""

    def fit(self) -> None:
        """Done once for all contexts: training on other data."""

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Read the contexts of some cases."""


class SimpleMethod:
    """A method without training on other data that suits every case."""

    adapted = False

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        self.model, self.scenario, self.settings = model, scenario, settings

    def missing(self, case: EvaluationCase) -> str | None:
        """Nothing is missing."""
        return None

    def fit(self) -> None:
        """Nothing to do."""

    def to_base(self, adapter: Adapter) -> Adapter:
        """The adapter on the device and in the dtype of the base model: converted once, not for each batch."""
        return adapter.to(self.model.device, self.model.base.dtype)

    def adapt(self, texts: Sequence[str]) -> list[Adapter]:
        """The generated adapters of contexts; equal texts are read once."""
        made: dict[str, Adapter] = {}
        for read, states, lengths in self.states(texts):
            adapters = self.model.adapters(states, lengths)
            made |= {text: self.to_base(adapter) for text, adapter in zip(read, adapters, strict=True)}
        return [made[text] for text in texts]

    def states(self, texts: Sequence[str]) -> Iterator[tuple[list[str], dict[str, Tensor], list[int]]]:
        """Read each different context once, as many in a pass as `batch_tokens` allows; a pass reads at most 8 chunks
        of each. Yields the texts of a pass, their states, and their numbers of tokens."""
        unique = list(dict.fromkeys(texts))
        tokens = [encode_context(self.model.tokenizer, text, first=True) for text in unique]
        lengths = [min(len(row), 8 * self.model.config.chunk_size) for row in tokens]
        for numbers in plan_batches(lengths, self.settings.batch_tokens, len(unique)):
            rows = [tokens[number] for number in numbers]
            yield [unique[number] for number in numbers], self.model.states(rows), [len(row) for row in rows]


class ClosedBook(SimpleMethod):
    """Nothing is known of the context."""

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Nothing."""
        return Prepared([None] * len(cases))


class FullPrompt(SimpleMethod):
    """The context is put before every question; if the model can't read all of it at once, the last part is kept, as in
    the paper (section 4.1)."""

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Keep the texts. Many questions about a context are asked together, so that it is read once for all of them;
        few ones share batches with those about other contexts."""
        questions = sum(len(case.context.questions) for case in cases)
        separate = questions >= SHARING * len(cases)
        texts = [case.context.text for case in cases]
        return Prepared([None] * len(cases), lambda number, query: texts[number], separate=separate, kept=texts)


class PassageSearch:
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
        self._texts = texts
        self._index = _bm25s().BM25(k1=1.5, b=0.75, method="atire", idf_method="lucene", dtype="float64")
        with np.errstate(invalid="ignore"):  # 0 / 0 if no passage has a word
            self._index.index([_words(text) for text in texts], create_empty_token=False, show_progress=False)

    def scores(self, query: str) -> list[float]:
        """The score of every passage."""
        known = self._index.get_tokens_ids(_words(query))
        return self._index.get_scores_from_ids(known).tolist() if known else [0.0] * len(self._texts)

    def best(self, query: str, count: int = 1) -> list[str]:
        """The best passages, in the order of the text; the earlier one of equals."""
        scores = self.scores(query)
        ranked = sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:count]
        return [self._texts[number] for number in sorted(ranked)]


def passages(text: str, words: int = 100) -> list[str]:
    """A text in pieces of so many words, the last one shorter; white space becomes a single space."""
    split = text.split()
    return [" ".join(split[start : start + words]) for start in range(0, len(split), words)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise InputError("retrieval needs the package bm25s: pip install 'gakernels[eval]'") from error
    return bm25s


class Retrieval(SimpleMethod):
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
        indexes = {
            text: PassageSearch(passages(text, self.settings.passage_words))
            for text in dict.fromkeys(case.context.text for case in cases)
        }

        def find(number: int, query: str) -> str:
            return "\n\n".join(indexes[cases[number].context.text].best(query, self.settings.passages))

        return find
