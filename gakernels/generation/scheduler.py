"""Continuous batching: which rows wait, join and leave; the life of a row from its prompt to the end of its text.

On a GPU the next step is started before the tokens of the last one are read, so that the device always has work. A row
that turns out to have ended then has one token too many, which is dropped.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import InputError, check_least
from gakernels.generation.decoding_batch import DecodingBatch
from gakernels.generation.log_probabilities import Scores, TokenLogprob, prompt_scores
from gakernels.generation.row_adapters import OneAdapter
from gakernels.generation.sampling import Adjustment, Sampling, adjusted, next_tokens
from gakernels.generation.text_output import TextOutput
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_text
from gakernels.model.transfer import moved

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


@dataclass(frozen=True)
class Piece:
    """What one step added to a continuation.

    Attributes:
        text: new text, possibly empty.
        tokens: number of tokens generated so far.
        finished: why it ended: `stop` (end token or stop text), `length` or `cancelled`; None while it continues.
        error: the error that ended it instead.
        logprob: of the new token, if its sampling asks for it.
    """

    text: str
    tokens: int
    finished: str | None = None
    error: Exception | None = None
    logprob: TokenLogprob | None = None


class Generation:
    """A row's prompt, its sampling, and its output so far.

    Args:
        prompt: token ids, at least one.
        sampling: how it is continued.
        adapter: its adapter, None for the base model alone, or a function that starts loading it; it is called when
            the row's turn comes near, and the row waits for the result.
        tokenizer: decodes the text; None for tokens only.
        end_tokens: ids that end a continuation.
        on_piece: called after each step, in the thread that decodes.

    Attributes:
        tokens: new token ids, an end token included.
        text: of the new tokens.
        logprobs: of the new tokens, if its sampling asks for them.
        prompt_logprobs: of the prompt's tokens, if its sampling asks for them; there before the first piece.
        finished: why it ended, see `Piece`; None while it continues.
        error: the error that ended it instead.
        on_end: called when it has finished, for whatever reason.

    Raises:
        InputError: the prompt is empty, or there are stop texts but no tokenizer.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: OneAdapter | Callable[[], Future[CompactAdapter]] = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        end_tokens: Sequence[int] = (),
        on_piece: Callable[[Piece], None] | None = None,
    ) -> None:
        if not prompt:
            raise InputError("a prompt must have at least one token, but it is empty")
        if sampling.stop and tokenizer is None:
            raise InputError("tokenizer is needed for stop texts; pass one")
        self.prompt, self.sampling = list(prompt), sampling
        self.tokens: list[int] = []
        self.begun = 0  # tokens that are finished or being computed
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.adjustment: Adjustment | None = None
        self.finished: str | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self.random = None
        if sampling.temperature > 0:
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            self.random = torch.Generator().manual_seed(seed)
        self._adapter = adapter
        self._end_tokens = frozenset(sampling.stop_token_ids)
        if sampling.stop_at_end_token:
            self._end_tokens |= frozenset(end_tokens)
        self._output = None
        if tokenizer is not None:
            self._output = TextOutput(tokenizer, self.prompt, sampling.stop, sampling.skip_special_tokens)
        self._on_piece = on_piece
        self._load: Future[CompactAdapter] | None = None
        self.on_end: Callable[[], None] | None = None

    @property
    def most_tokens(self) -> int:
        """The most tokens that prompt and continuation may reach together."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def goes_on(self) -> bool:
        """Whether it may get one more token."""
        return self.finished is None and self.begun < self.sampling.max_new_tokens

    def start_loading(self) -> None:
        """Start loading the adapter, unless that has begun."""
        if callable(self._adapter) and self._load is None:
            self._load = self._adapter()

    @property
    def ready(self) -> bool:
        """Whether the adapter is loaded, or its loading failed."""
        return not callable(self._adapter) or (self._load is not None and self._load.done())

    def adapter(self) -> OneAdapter:
        """The adapter; waits while it is being loaded. Raises what loading raised."""
        if not callable(self._adapter):
            return self._adapter
        self.start_loading()
        assert self._load is not None
        return self._load.result()

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Take the next token, and end the continuation if it is complete; does nothing once it has ended."""
        if self.finished is not None:
            return
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self._end_tokens:
            self._finish(STOP, logprob=logprob)
            return
        piece, stopped = ("", False) if self._output is None else self._output.push(token)
        if stopped:
            self.finished = STOP
        if self.finished is None and len(self.tokens) >= self.sampling.max_new_tokens:
            self._finish(LENGTH, piece, logprob)
        else:
            self._emit(piece, logprob)

    def cancel(self) -> None:
        """End it at the next step; may be called from any thread."""
        self.cancelled = True

    def end_cancelled(self) -> None:
        """Carry out the cancellation."""
        self.finished = CANCELLED
        self._emit("")

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self.error, self.finished = error, CANCELLED
        self._emit("")

    def _finish(self, reason: str, piece: str = "", logprob: TokenLogprob | None = None) -> None:
        """End with the text that was held back, which may contain a stop text after all."""
        self.finished = reason
        if self._output is not None:
            rest, stopped = self._output.flush()
            self.finished = STOP if stopped else reason
            piece += rest
        self._emit(piece, logprob)

    def _emit(self, text: str, logprob: TokenLogprob | None = None) -> None:
        self.text += text
        if self._on_piece is not None:
            self._on_piece(Piece(text, len(self.tokens), self.finished, self.error, logprob))
        if self.finished is not None and self.on_end is not None:
            self.on_end()


class TokensToCome:
    """The next token of some rows, on its way from the device, with the log-probabilities that rows ask for.

    Args:
        rows: get the tokens.
        tokens: of the rows, on the device.
        logits: of the model, before what rows add to them.
        prompts: log-probabilities of prompts that were read just now, with the row that asks for them.
    """

    def __init__(
        self,
        rows: Sequence[Generation],
        tokens: Tensor,
        logits: Tensor,
        prompts: Sequence[tuple[Generation, list[Scores]]] = (),
    ) -> None:
        self.rows, self._prompts = list(rows), prompts
        self._scored = [place for place, row in enumerate(rows) if row.sampling.logprobs is not None]
        self._scores = None
        if self._scored:
            places = moved(torch.tensor(self._scored), tokens.device)
            top = max(rows[place].sampling.logprobs or 0 for place in self._scored)
            self._scores = Scores(logits.index_select(0, places), tokens.index_select(0, places), top)
        self._copy, self._copied = tokens, None
        if tokens.is_cuda:
            self._copy = tokens.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tokens.device))

    def read(self) -> None:
        """Wait for the tokens and give them to the rows."""
        if self._copied is not None:
            self._copied.synchronize()
        for row, scores in self._prompts:
            first = TokenLogprob(row.prompt[0], None)
            row.prompt_logprobs = [first, *(found for block in scores for found in block.read())]
        tokens = self._copy.tolist()
        logprobs: list[TokenLogprob | None] = [None] * len(tokens)
        if self._scores is not None:
            for place, found in zip(self._scored, self._scores.read(), strict=True):
                own = self.rows[place].sampling.logprobs  # another row of the batch may have asked for more
                logprobs[place] = replace(found, top=found.top[:own])
        for row, token, logprob in zip(self.rows, tokens, logprobs, strict=True):
            row.accept(token, logprob)


class Scheduler:
    """Decodes the rows of all users in one batch, one token per step. Not thread-safe: one thread owns it.

    Args:
        model: must not change while this is in use.
        max_rows: maximum number of rows in a batch; others wait in order of arrival.
        max_prefill_tokens: maximum number of prompt tokens, including padding, that join in one step (a longer prompt
            joins alone); the other rows wait for them.
        max_cache_tokens: limit of the key-value cache: rows times the tokens that the longest of them may reach. A row
            that needs more is decoded alone.
        batch: the batch that decodes; by default one for compact adapters.

    Raises:
        InputError: a limit is below 1.
    """

    def __init__(
        self,
        model: GenerativeAdapter,
        max_rows: int = 64,
        max_prefill_tokens: int = 8192,
        max_cache_tokens: int = 262_144,
        batch: DecodingBatch | None = None,
    ) -> None:
        check_least(1, max_rows=max_rows, max_prefill_tokens=max_prefill_tokens, max_cache_tokens=max_cache_tokens)
        self.max_rows, self.max_prefill_tokens, self.max_cache_tokens = max_rows, max_prefill_tokens, max_cache_tokens
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self._batch = batch or DecodingBatch(model)
        self._last = torch.empty(0, dtype=torch.int64, device=model.device)  # last token of each running row
        self._to_come: deque[TokensToCome] = deque()
        self._runs_ahead = runs_ahead(model.device)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running and not self._to_come

    def submit(self, generation: Generation) -> None:
        """Put a generation at the end of the queue."""
        self.waiting.append(generation)

    def step(self) -> int:
        """Begin the next token of each row, let the finished ones leave and waiting ones join with their first token.

        Returns:
            The number of tokens; 0 if the adapters of all waiting rows are still being loaded.
        """
        try:
            self._drop_cancelled()
            before = len(self._to_come)
            tokens = self._advance()
            self._read(before)
            tokens += self._join()
            self._read(0)
            return tokens
        except Exception as error:
            self._fail_running(error)
            raise

    def fail_all(self, error: Exception) -> None:
        """End all running and waiting rows with an error."""
        self._fail_running(error)
        while self.waiting:
            self.waiting.popleft().fail(error)

    def _drop_cancelled(self) -> None:
        for generation in [*self.running, *self.waiting]:
            if generation.cancelled and generation.finished is None:
                generation.end_cancelled()
        self.waiting = deque(generation for generation in self.waiting if generation.finished is None)
        if not all(generation.goes_on for generation in self.running):
            self._exchange([], [])

    def _advance(self) -> int:
        """One token for each row; the finished ones leave with the next exchange."""
        if not self.running:
            return 0
        self._last = self._begin(self.running, self._batch.advance(self._last))
        return len(self.running)

    def _join(self) -> int:
        """The first token of the waiting rows that there is room for."""
        going_on = sum(generation.goes_on for generation in self.running)
        joining, adapters = self._admitted(self.max_rows - going_on)
        if joining or going_on < len(self.running):
            self._exchange(joining, adapters)
        return len(joining)

    def _exchange(self, joining: Sequence[Generation], adapters: Sequence[OneAdapter]) -> None:
        """Finished rows leave, others join with their first token."""
        kept = [row for row, generation in enumerate(self.running) if generation.goes_on]
        last = self._last[torch.tensor(kept, dtype=torch.int64).to(self._last.device)]
        self.running = [*(self.running[row] for row in kept), *joining]
        prompts: list[tuple[Generation, list[Scores]]] = []
        asking = any(generation.sampling.prompt_logprobs for generation in joining)
        on_hidden = partial(self._score, joining, prompts) if asking else None
        logits = self._batch.exchange(kept, [generation.prompt for generation in joining], adapters, on_hidden)
        self._last = torch.cat([last, self._begin(joining, logits, prompts)]) if joining else last

    def _score(
        self, joining: Sequence[Generation], prompts: list[tuple[Generation, list[Scores]]], hidden: Tensor
    ) -> None:
        """Append the log-probabilities of the prompts whose rows ask for them."""
        for row, states in zip(joining, hidden, strict=True):
            if row.sampling.prompt_logprobs:
                own, top = states[-len(row.prompt) :], row.sampling.logprobs or 0
                prompts.append((row, prompt_scores(self._batch.model, own, row.prompt, top)))

    def _begin(
        self,
        rows: Sequence[Generation],
        logits: Tensor,
        prompts: Sequence[tuple[Generation, list[Scores]]] = (),
    ) -> Tensor:
        """The next token of each row; also starts its copy to the host."""
        adjustments = [row.adjustment for row in rows]
        tokens = next_tokens(
            adjusted(logits, adjustments), [row.sampling for row in rows], [row.random for row in rows]
        )
        for place, (row, adjustment) in enumerate(zip(rows, adjustments, strict=True)):
            row.begun += 1
            if adjustment is not None:
                adjustment.count(tokens[place : place + 1])
        self._to_come.append(TokensToCome(rows, tokens, logits, prompts))
        return tokens

    def _read(self, count: int) -> None:
        """Give the rows the tokens of the first `count` unread steps, or of all of them unless this runs ahead."""
        for _ in range(count if self._runs_ahead else len(self._to_come)):
            self._to_come[0].read()
            self._to_come.popleft()

    def _admitted(self, room: int) -> tuple[list[Generation], list[OneAdapter]]:
        """Take from the queue what may join now; a row whose adapter is not loaded yet lets others pass."""
        joining: list[Generation] = []
        adapters: list[OneAdapter] = []
        passed: list[Generation] = []
        longest, ahead = 0, 2 * self.max_rows
        for generation in islice(self.waiting, ahead):
            generation.start_loading()  # ahead of time
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
        rows = [row for row in [*self.running, *joining] if row.goes_on]
        longest = max(row.most_tokens for row in [*rows, generation])
        return not rows or longest * (len(rows) + 1) <= self.max_cache_tokens

    def _admit(self, generation: Generation, joining: list[Generation], adapters: list[OneAdapter]) -> None:
        try:
            adapter = generation.adapter()
            if adapter is not None:
                self._batch.form.check(adapter)
            if generation.sampling.adjusts:
                vocabulary = self._batch.model.base.config.get_text_config().vocab_size
                generation.adjustment = Adjustment(generation.sampling, vocabulary, self._last.device)
        except Exception as error:  # only this row fails
            generation.fail(error)
            return
        joining.append(generation)
        adapters.append(adapter)

    def _fail_running(self, error: Exception) -> None:
        """A step failed: end its rows; the waiting ones can still run."""
        for generation in [*self.running, *(row for tokens in self._to_come for row in tokens.rows)]:
            if generation.finished is None:
                generation.fail(error)
        self.running = []
        self._to_come.clear()
        self._batch.exchange([])


def generate(
    model: GenerativeAdapter,
    prompts: Sequence[str | Sequence[int]],
    adapters: Sequence[CompactAdapter | None],
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
    max_rows: int = 64,
) -> list[Generation]:
    """Continue prompts, each with its own adapter, in batches of at most `max_rows` rows.

    Args:
        model: the base model and the generator of the adapters.
        prompts: texts or token ids.
        adapters: one for each prompt, None for the base model alone.
        sampling: of all prompts, or one for each.
        max_rows: rows decoded together; a row that is finished makes room for the next.

    Returns:
        The finished generations: `tokens`, `text` (if there is a tokenizer) and why they `finished`.

    Raises:
        InputError: the numbers of prompts, adapters and samplings differ, a prompt is empty, or a text has
            no tokenizer.
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
    return run(scheduler, generations)


def run(scheduler: Scheduler, generations: list[Generation]) -> list[Generation]:
    """Run generations to their end. Raises the error of the first that failed."""
    for generation in generations:
        scheduler.submit(generation)
    while not scheduler.idle:
        scheduler.step()
    for generation in generations:
        if generation.error is not None:
            raise generation.error
    return generations


def runs_ahead(device: torch.device) -> bool:
    """Whether the host can continue while the device computes."""
    return device.type == "cuda"


def _tokens(tokenizer: PreTrainedTokenizerBase | None, prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if tokenizer is None:
        raise InputError("tokenizer is needed to turn text into tokens; pass one to GenerativeAdapter")
    return encode_text(tokenizer, prompt)
