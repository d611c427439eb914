"""What all methods have in common: a context is prepared, and then requests about it are put to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gakernels.adapters.adapter import Adapter
from gakernels.evaluation.cases import Case, Scenario
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_context


@dataclass(frozen=True)
class MethodSettings:
    """What some of the methods need to know.

    Attributes:
        passages: how many passages retrieval puts in front of a question.
        passage_words: their length.
        static_lora: file of the trained static LoRA, for the control of that name.
        learning_rate: of all fine-tuning; None for what docs/evaluation.md names.
        epochs: of all fine-tuning, at most; None for what docs/evaluation.md names.
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
    """What a method made of some cases.

    Attributes:
        adapters: of each of them; None for the model as it is.
        in_front: the text in front of a prompt, from the number of the case among them and the query; None for none.
        weights: puts the weights for one of them in force while a block runs; None: the base model's own.
        separate: whether requests of different cases don't share a batch: each case has weights of its own, or its
            requests have much in common at their start, which is then read once.
    """

    adapters: Sequence[Adapter | None]
    in_front: Callable[[int, str], str | None] = lambda number, query: None
    weights: Callable[[int], AbstractContextManager[None]] | None = None
    separate: bool = False


class Method(Protocol):
    """A way of making a context known to a model.

    Attributes:
        adapted: whether it is asked as an adapted model is (the scenario's `adapted_prompt`).
    """

    adapted: bool

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None: ...

    def missing(self, case: Case) -> str | None:
        """Why a case can't be asked with this method; None if it can."""

    def fit(self) -> None:
        """What is done once for all contexts: training on other data."""

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """Take in the contexts of some cases."""


class SimpleMethod:
    """A method without training on other data that suits every case."""

    adapted = False

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        self.model, self.scenario, self.settings = model, scenario, settings

    def missing(self, case: Case) -> str | None:
        """Nothing is missing."""
        return None

    def fit(self) -> None:
        """Nothing to do."""

    def to_base(self, adapter: Adapter) -> Adapter:
        """The adapter where the base model is and in its dtype, so that this is done once and not for each batch."""
        return adapter.to(self.model.device, self.model.base.dtype)

    def adapt(self, texts: Sequence[str]) -> list[Adapter]:
        """The generated adapters of contexts, as many in a pass as `batch_tokens` allows; equal texts are read once."""
        unique = list(dict.fromkeys(texts))
        tokens = [encode_context(self.model.tokenizer, text, first=True) for text in unique]
        made: dict[str, Adapter] = {}
        for numbers in self._passes([len(row) for row in tokens]):
            rows = [tokens[number] for number in numbers]
            adapters = self.model.adapters(self.model.states(rows), [len(row) for row in rows])
            made |= {unique[number]: self.to_base(adapter) for number, adapter in zip(numbers, adapters, strict=True)}
        return [made[text] for text in texts]

    def _passes(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Contexts of like lengths together; a pass reads at most 8 chunks of each."""
        numbers: list[int] = []
        for number in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
            longest = min(lengths[(numbers or [number])[0]], 8 * self.model.config.chunk_size)
            if numbers and longest * (len(numbers) + 1) > self.settings.batch_tokens:
                yield numbers
                numbers = []
            numbers.append(number)
        yield numbers
