"""Generation: one prompt on its way to its continuation."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import InputError
from gakernels.generation.sampling import Sampling
from gakernels.generation.text_output import TextOutput

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


@dataclass(frozen=True)
class Piece:
    """What one step added to a continuation.

    Attributes:
        text: new text, maybe none.
        tokens: number of tokens generated so far.
        finished: why it ended: `stop` (end token or stop text), `length` or `cancelled`; None: it goes on.
        error: what went wrong instead.
    """

    text: str
    tokens: int
    finished: str | None = None
    error: Exception | None = None


class Generation:
    """A row's prompt, its way of sampling, and what came out so far.

    Args:
        prompt: token ids, at least one.
        sampling: how it is continued.
        adapter: its adapter, None for the base model alone, or a function that starts loading it: it is called when
            the row's turn comes near, and the row waits for the result.
        tokenizer: for texts; None: only tokens come out.
        end_tokens: ids that end a continuation.
        on_piece: called after each step, in the thread that decodes.

    Raises:
        InputError: the prompt is empty, or there are stop texts but no tokenizer.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: CompactAdapter | Callable[[], Future[CompactAdapter]] | None = None,
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
        self.text = ""
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
        self._on_end: Callable[[], None] | None = None

    def on_end(self, callback: Callable[[], None]) -> None:
        """Have a function called once it is finished, for whatever reason."""
        self._on_end = callback

    @property
    def most_tokens(self) -> int:
        """How long prompt and continuation may become together."""
        return len(self.prompt) + self.sampling.max_new_tokens

    def start_loading(self) -> None:
        """Have the adapter loaded, if that has not begun."""
        if callable(self._adapter) and self._load is None:
            self._load = self._adapter()

    @property
    def ready(self) -> bool:
        """Whether the adapter is there, or will never be."""
        return not callable(self._adapter) or (self._load is not None and self._load.done())

    def adapter(self) -> CompactAdapter | None:
        """The adapter; waits for it where it is being loaded. Raises what loading raised."""
        if not callable(self._adapter):
            return self._adapter
        self.start_loading()
        assert self._load is not None
        return self._load.result()

    def accept(self, token: int) -> None:
        """Take the next token, and end the continuation where it is time."""
        self.tokens.append(token)
        if token in self._end_tokens:
            self._finish(STOP)
            return
        piece, stopped = ("", False) if self._output is None else self._output.push(token)
        if stopped:
            self.finished = STOP
        if self.finished is None and len(self.tokens) >= self.sampling.max_new_tokens:
            self._finish(LENGTH, piece)
        else:
            self._emit(piece)

    def cancel(self) -> None:
        """End it at the next step; may be called from any thread."""
        self.cancelled = True

    def end_cancelled(self) -> None:
        """The step has come."""
        self.finished = CANCELLED
        self._emit("")

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self.error, self.finished = error, CANCELLED
        self._emit("")

    def _finish(self, reason: str, piece: str = "") -> None:
        """End with the text that was held back, which may bring a stop text after all."""
        self.finished = reason
        if self._output is not None:
            rest, stopped = self._output.flush()
            self.finished = STOP if stopped else reason
            piece += rest
        self._emit(piece)

    def _emit(self, text: str) -> None:
        self.text += text
        if self._on_piece is not None:
            self._on_piece(Piece(text, len(self.tokens), self.finished, self.error))
        if self.finished is not None and self._on_end is not None:
            self._on_end()
