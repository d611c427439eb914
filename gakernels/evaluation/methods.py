"""Methods: ways of telling a model a context; here what all share, and the two plainest ones.

A context is prepared, and then requests about it are put to a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from gakernels.adapters.adapter import Adapter
from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import check_least
from gakernels.evaluation.scenarios import EvaluationCase, Scenario
from gakernels.generation.decoder import SharedStart, plan_batches
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_context

SHARING = 4  # questions per context from which reading it once saves more than larger batches do


@dataclass(frozen=True)
class MethodSettings:
    """What some of the methods need to know.

    Attributes:
        passages: number of passages that retrieval puts before a question.
        passage_words: words in a passage.
        embedding_model: folder or hub name of the model by which `retrieval_embedding` ranks passages.
        truncate_to: tokens of the context in a truncated prompt; None for as many as have keys and values of the size
            of an adapter.
        static_lora: file of the trained static LoRA, for the control of that name.
        learning_rate: of all fine-tuning; None for that of docs/evaluation.md.
        epochs: of all fine-tuning, at most; None for those of docs/evaluation.md.
        seed: of the order of training examples and of a LoRA's start.
        batch_tokens: most tokens read in one pass over contexts.
        chat: whether questions are a user's messages, in the tokenizer's chat template.

    Raises:
        InputError: `truncate_to` is below 1.
    """

    passages: int = 1
    passage_words: int = 100
    embedding_model: str | None = None
    truncate_to: int | None = None
    static_lora: Path | None = None
    learning_rate: float | None = None
    epochs: int | None = None
    seed: int = 0
    batch_tokens: int = 16_384
    chat: bool = False

    def __post_init__(self) -> None:
        check_least(1, truncate_to=self.truncate_to)


@dataclass(frozen=True)
class Prepared:
    """A method's preparation of some cases.

    Attributes:
        adapters: of each case; None for the base model alone.
        in_front: from the number of a case in the list and a query to the text in front of the prompt; None for none.
        weights: puts the weights of a case in place while a block runs; None for the base model's own.
        start: reads what the prompts about a case begin with, once for all of them: keys and values that are kept; None
            if nothing is. It returns None for a case of which nothing is kept.
        separate: whether requests of different cases must not share a batch: each case has its own weights, or its
            requests have a long common start, which is then read once.
        kept: the adapters, texts and tensors that are stored of the contexts between questions.
    """

    adapters: Sequence[Adapter | CompactAdapter | None]
    in_front: Callable[[int, str], str | None] = lambda number, query: None
    weights: Callable[[int], AbstractContextManager[None]] | None = None
    start: Callable[[int], SharedStart | None] | None = None
    separate: bool = False
    kept: Sequence[Adapter | CompactAdapter | str | Tensor] = ()

    def kept_bytes(self) -> int:
        """The size of what is kept: adapters and tensors as they are, texts in UTF-8."""
        return sum(_bytes(one) for one in self.kept)


def _bytes(kept: Adapter | CompactAdapter | str | Tensor) -> int:
    if isinstance(kept, str):
        return len(kept.encode())
    return kept.bytes() if isinstance(kept, Adapter) else kept.nbytes


class Method(ABC):
    """A way of telling a model a context; by default one that suits every case, without training on other data.

    Attributes:
        adapted: whether it is asked as an adapted model is (the scenario's `adapted_prompt`).
        passes: passes over a context in training, if the method has a number of its own.
        chosen: settings that `fit` chose, by name.
    """

    adapted = False
    passes: int | None = None
    chosen: Mapping[str, float] = MappingProxyType({})

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        self.model, self.scenario, self.settings = model, scenario, settings

    def missing(self, case: EvaluationCase) -> str | None:
        """Why this method can't answer a case; None if it can."""
        return None

    def fit(self) -> None:  # noqa: B027 (most methods have nothing to do)
        """Done once for all contexts: training on other data."""

    @abstractmethod
    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Read the contexts of some cases."""

    def tokens_read(self, tokens: int) -> int:
        """How many tokens of a context of so many it takes in."""
        return tokens

    def write(self, question: str) -> str:
        """A question as this method asks it."""
        for_base = None if self.adapted else self.scenario.write_base_prompt
        return (for_base or self.scenario.write_prompt)(question)

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


class ClosedBook(Method):
    """Nothing is known of the context."""

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Nothing."""
        return Prepared([None] * len(cases))


class FullPrompt(Method):
    """The context is put before every question; if the model can't read all of it at once, the last part is kept, as in
    the paper (section 4.1)."""

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Keep the texts. Many questions about a context are asked together, so that it is read once for all of them;
        few ones share batches with those about other contexts."""
        questions = sum(len(case.context.questions) for case in cases)
        separate = questions >= SHARING * len(cases)
        texts = [case.context.text for case in cases]
        return Prepared([None] * len(cases), lambda number, query: texts[number], separate=separate, kept=texts)
