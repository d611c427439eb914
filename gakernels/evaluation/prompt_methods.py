"""Methods that put the context before the question, but do not read all of it each time: a part, or a cache of it."""

from __future__ import annotations

from collections.abc import Sequence

from gakernels.cost.shapes import ModelShape
from gakernels.errors import InputError
from gakernels.evaluation.cost import adapter_numbers, key_value_numbers
from gakernels.evaluation.methods import Method, MethodSettings, Prepared
from gakernels.evaluation.prompts import Asker
from gakernels.evaluation.scenarios import EvaluationCase, Scenario
from gakernels.generation.decoder import Decoder, SharedStart
from gakernels.model import GenerativeAdapter


class TruncatedPrompt(Method):
    """The first or last n tokens of the context before every question. By default n tokens have keys and values of
    about the size of the context's adapter.

    Args:
        last: whether the last tokens are kept, not the first.

    Raises:
        InputError: the tokenizer is a slow one, or n is not given and can't be told from the shape of the model.
    """

    def __init__(
        self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings, last: bool = False
    ) -> None:
        super().__init__(model, scenario, settings)
        assert model.tokenizer is not None
        if not model.tokenizer.is_fast:
            raise InputError("a truncated prompt needs a fast tokenizer, which tells the characters of each token")
        self._tokenizer, self._last = model.tokenizer, last
        self.tokens = settings.truncate_to or tokens_like_adapter(model)

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Cut the texts."""
        texts = [self._cut(case.context.text) for case in cases]
        return Prepared([None] * len(cases), lambda number, query: texts[number], kept=texts)

    def tokens_read(self, tokens: int) -> int:
        """As many as are kept."""
        return min(tokens, self.tokens)

    def _cut(self, text: str) -> str:
        places = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(places) <= self.tokens:
            return text
        return text[places[-self.tokens][0] :] if self._last else text[: places[self.tokens - 1][1]]


def tokens_like_adapter(model: GenerativeAdapter) -> int:
    """How many tokens have keys and values of about the size of an adapter, at least 1.

    Raises:
        InputError: the shape of the model is not known.
    """
    try:
        shape = ModelShape.from_config(model.base.config)
    except InputError as error:
        raise InputError(f"--truncate-to must say how many tokens a truncated prompt has: {error}") from error
    return max(1, round(adapter_numbers(shape, model.config) / key_value_numbers(shape, 1)))


class CachedPrompt(Method):
    """The context before every question, read once: its keys and values are kept. The answers are those of `prompt`.

    A context that does not fit into the model together with an answer is read anew with every question, as in `prompt`.

    Raises:
        InputError: the model has a sliding window.
    """

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings)
        self._decoder = Decoder(model)
        if self._decoder.slides:
            raise InputError("prompt_cached needs a base model without a sliding window")
        self._asker = Asker(self._decoder.tokenizer, settings.chat)

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Nothing is read yet: the keys and values of all contexts may not fit in memory together."""
        texts = [case.context.text for case in cases]
        starts = [self._start(text) for text in texts]

        def read(number: int) -> SharedStart | None:
            start = starts[number]
            return None if start is None else self._decoder.read_start(start)

        return Prepared(
            [None] * len(cases),
            lambda number, query: texts[number],
            start=read,
            separate=True,
            kept=[text for text, start in zip(texts, starts, strict=True) if start is None],
        )

    def _start(self, text: str) -> list[int] | None:
        """The tokens that prompts about a text begin with, whatever is asked; None if they leave no room."""
        one, other = (self._asker.question(f"{text}\n\n{asked}") for asked in ("A", "?"))
        pairs = enumerate(zip(one, other, strict=False))
        start = one[: next((place for place, (left, right) in pairs if left != right), len(one))]
        limit = self._decoder.limit
        fits = limit is None or len(start) + self.scenario.new_tokens < limit
        return start if fits else None
