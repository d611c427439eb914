"""Scheduler: continuous batching. Rows join as soon as there is room and leave as soon as they are finished."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import InputError
from gakernels.generation.decoding_batch import DecodingBatch
from gakernels.generation.running import Generation
from gakernels.generation.sampling import Sampling, next_tokens
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_text


class Scheduler:
    """Decodes the rows of all users in one batch, one token a step. Not thread-safe: one thread owns it.

    Args:
        model: not to be changed while this is in use.
        max_rows: most rows in a batch; others wait in the order of their coming.
        max_prefill_tokens: most tokens of prompts, with their padding, that join in one step (a longer prompt joins
            alone): the other rows wait for them.
        max_cache_tokens: bound of the key-value cache: rows times the tokens that the longest of them may reach. A row
            that needs more is decoded alone.

    Raises:
        InputError: a limit is below 1.
    """

    def __init__(
        self,
        model: GenerativeAdapter,
        max_rows: int = 64,
        max_prefill_tokens: int = 8192,
        max_cache_tokens: int = 262_144,
    ) -> None:
        limits = {"max_rows": max_rows, "max_prefill_tokens": max_prefill_tokens, "max_cache_tokens": max_cache_tokens}
        for name, value in limits.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, but it is {value}")
        self.max_rows, self.max_prefill_tokens, self.max_cache_tokens = limits.values()
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self._batch = DecodingBatch(model)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def submit(self, generation: Generation) -> None:
        """Put a generation at the end of the queue."""
        self.waiting.append(generation)

    def step(self) -> int:
        """Give each row its next token, let the finished ones leave and waiting ones join with their first token.

        Returns:
            The number of tokens; 0 where every waiting row's adapter is still being loaded.
        """
        try:
            self._drop_cancelled()
            return self._advance() + self._join()
        except Exception as error:
            self._fail_all(error)
            raise

    def _drop_cancelled(self) -> None:
        for generation in self.running:
            if generation.cancelled and generation.finished is None:
                generation.end_cancelled()
        waiting, self.waiting = self.waiting, deque()
        for generation in waiting:
            if generation.cancelled:
                generation.end_cancelled()
            else:
                self.waiting.append(generation)
        if any(generation.finished for generation in self.running):
            self._exchange([], [])

    def _advance(self) -> int:
        """One token for each row; the finished ones leave with the next exchange."""
        if not self.running:
            return 0
        logits = self._batch.advance([generation.tokens[-1] for generation in self.running])
        return self._accept(self.running, logits)

    def _join(self) -> int:
        """The first token of the rows that there is room for."""
        unfinished = sum(generation.finished is None for generation in self.running)
        joining, adapters = self._admitted(self.max_rows - unfinished)
        if not joining and unfinished == len(self.running):
            return 0
        return self._accept(joining, self._exchange(joining, adapters))

    def _exchange(self, joining: Sequence[Generation], adapters: Sequence[CompactAdapter | None]) -> Tensor:
        """Finished rows leave, others join; returns the logits of those."""
        kept = [row for row, generation in enumerate(self.running) if generation.finished is None]
        self.running = [*(self.running[row] for row in kept), *joining]
        return self._batch.exchange(kept, [generation.prompt for generation in joining], adapters)

    @staticmethod
    def _accept(rows: Sequence[Generation], logits: Tensor) -> int:
        if not rows:
            return 0
        tokens = next_tokens(logits, [row.sampling for row in rows], [row.random for row in rows])
        for generation, token in zip(rows, tokens, strict=True):
            generation.accept(token)
        return len(rows)

    def _admitted(self, room: int) -> tuple[list[Generation], list[CompactAdapter | None]]:
        """Takes from the queue what may join now; one whose adapter is not there yet lets others pass."""
        joining: list[Generation] = []
        adapters: list[CompactAdapter | None] = []
        passed: list[Generation] = []
        longest, ahead = 0, 2 * self.max_rows
        for generation in islice(self.waiting, ahead):
            generation.start_loading()  # ahead of need
        while self.waiting and len(joining) < room and len(passed) < ahead:
            generation = self.waiting[0]
            longest = max(longest, len(generation.prompt))
            if joining and longest * (len(joining) + 1) > self.max_prefill_tokens:
                break
            if not self._fits_cache(generation, joining):
                break
            self.waiting.popleft()
            if not generation.ready:
                passed.append(generation)
            else:
                self._admit(generation, joining, adapters)
        self.waiting.extendleft(reversed(passed))
        return joining, adapters

    def _fits_cache(self, generation: Generation, joining: Sequence[Generation]) -> bool:
        """Whether the cache has room for one more row, whatever lengths the rows will reach."""
        rows = [row for row in [*self.running, *joining] if row.finished is None]
        longest = max(row.most_tokens for row in [*rows, generation])
        return not rows or longest * (len(rows) + 1) <= self.max_cache_tokens

    def _admit(self, generation: Generation, joining: list[Generation], adapters: list[CompactAdapter | None]) -> None:
        try:
            adapter = generation.adapter()
            if adapter is not None:
                self._batch.shared.check(adapter)
        except Exception as error:  # this row's alone
            generation.fail(error)
            return
        joining.append(generation)
        adapters.append(adapter)

    def _fail_all(self, error: Exception) -> None:
        """A step went wrong: its rows can't go on, those that wait can."""
        for generation in self.running:
            if generation.finished is None:
                generation.fail(error)
        self.running = []
        self._batch.exchange([])


def generate(
    model: GenerativeAdapter,
    prompts: Sequence[str | Sequence[int]],
    adapters: Sequence[CompactAdapter | None],
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
    max_rows: int = 64,
) -> list[Generation]:
    """Continue prompts, each with an adapter of its own, in batches of at most `max_rows` rows.

    Args:
        model: the base model and the generator of the adapters.
        prompts: texts or token ids.
        adapters: one for each prompt, None for the base model alone.
        sampling: of all prompts, or one for each.
        max_rows: rows decoded together; a row that is finished makes room for the next.

    Returns:
        The finished generations: `tokens`, `text` (where there is a tokenizer) and why they `finished`.

    Raises:
        InputError: the numbers of prompts, adapters and samplings differ, a prompt is empty, or there is no tokenizer
            for a text.
        FormatError: an adapter belongs to another base model or generator.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if not len(prompts) == len(adapters) == len(samplings):
        raise InputError(
            f"there must be one adapter and sampling for each of the {len(prompts)} prompts, but there are "
            f"{len(adapters)} and {len(samplings)}"
        )
    scheduler, ends = Scheduler(model, max_rows), model.end_tokens()
    generations = [
        Generation(_tokens(model.tokenizer, prompt), how, adapter, model.tokenizer, ends)
        for prompt, adapter, how in zip(prompts, adapters, samplings, strict=True)
    ]
    for generation in generations:
        scheduler.submit(generation)
    while not scheduler.idle:
        scheduler.step()
    for generation in generations:
        if generation.error is not None:
            raise generation.error
    return generations


def _tokens(tokenizer: PreTrainedTokenizerBase | None, prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if tokenizer is None:
        raise InputError("tokenizer is needed to turn text into tokens; pass one to GenerativeAdapter")
    return encode_text(tokenizer, prompt)
