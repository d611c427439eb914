"""The parts of an answer, and its forms in the OpenAI interface."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from gakernels.generation.log_probabilities import TokenLogprob
from gakernels.generation.scheduler import LENGTH
from gakernels.generation.text_output import token_text
from gakernels.server.context_store import Context
from gakernels.server.protocol import (
    ChatChoice,
    ChatChunkChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    FinishReason,
    TopLogprob,
    Usage,
    UsageWithContext,
)

_LEAST = -9999.0  # OpenAI's log-probability of what is impossible; JSON has no infinity


@dataclass(frozen=True)
class Source:
    """Where the adapter of a request comes from.

    Attributes:
        context: None for the base model alone.
        read: tokens that were read for it just now, if the request brought it as text; None if it named it.
    """

    context: Context | None = None
    read: int | None = None

    def usage(self) -> dict[str, int | bool]:
        """What the usage says about a context that came with the request."""
        if self.context is None or self.read is None:
            return {}
        return {"context_tokens": self.context.tokens_seen, "context_cached": self.read == 0}


def usage(prompt: int, completion: int, source: Source) -> Usage:
    """Numbers of tokens of a prompt and its completions, and of the context that came with them."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    more = source.usage()
    return UsageWithContext.model_validate({**counts, **more}) if more else Usage(**counts)


@dataclass(frozen=True)
class EventStream:
    """The events of an answer.

    Attributes:
        events: as text.
        end: cleanup when the events are no longer wanted, even if the first one was never requested.
    """

    events: AsyncGenerator[str, None]
    end: Callable[[], None] = lambda: None

    async def close(self) -> None:
        """Clean up: the answer is complete, or its reader has gone."""
        self.end()
        await self.events.aclose()


Answer = BaseModel | dict[str, Any] | EventStream


class Completions(Protocol):
    """What computes answers: the engine of this process, or another server."""

    async def complete(self, request: CompletionRequest, source: Source) -> Answer:
        """The answer to a completion request, or the events of a stream."""

    async def chat(self, request: ChatRequest, source: Source) -> Answer:
        """The answer to a chat request, or the events of a stream."""


@dataclass(frozen=True)
class Part:
    """A piece of an answer, or a whole one.

    Attributes:
        index: number of the answer.
        text: of the piece.
        logprobs: of its tokens, if they are asked for.
        finished: why the answer ended, see `Piece`; None while it continues.
    """

    index: int
    text: str
    logprobs: Sequence[TokenLogprob] = ()
    finished: str | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended, in OpenAI's terms."""
        if self.finished is None:
            return None
        return "length" if self.finished == LENGTH else "stop"


class TokenTexts:
    """The texts of single tokens; remembers them. Belongs to the thread of its tokenizer.

    Args:
        tokenizer: without one, a token is called `token_id:` and its id.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer, self._known = tokenizer, dict[int, str]()

    def __call__(self, token: int) -> str:
        """The text of a token."""
        if self._tokenizer is None:
            return f"token_id:{token}"
        if token not in self._known:
            self._known[token] = token_text(self._tokenizer, token)
        return self._known[token]


class CompletionForm:
    """Makes choices of a completion; remembers where the tokens of each text go on.

    Args:
        texts: of tokens.
        top: number of the most likely tokens to tell; None where no log-probabilities are asked for.
    """

    def __init__(self, texts: TokenTexts, top: int | None) -> None:
        self._texts, self._top, self._ends = texts, top, dict[int, int]()

    def choice(self, part: Part) -> CompletionChoice:
        """A continuation, or its next piece."""
        logprobs = None if self._top is None else self._logprobs(part)
        return CompletionChoice(index=part.index, text=part.text, finish_reason=part.finish_reason, logprobs=logprobs)

    def _logprobs(self, part: Part) -> CompletionLogprobs:
        tokens, offsets, end = [self._texts(one.token) for one in part.logprobs], [], self._ends.get(part.index, 0)
        for token in tokens:
            offsets.append(end)
            end += len(token)
        self._ends[part.index] = end
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[None if one.logprob is None else _finite(one.logprob) for one in part.logprobs],
            top_logprobs=[self._alternatives(one) for one in part.logprobs] if self._top else None,
            text_offset=offsets,
        )

    def _alternatives(self, one: TokenLogprob) -> dict[str, float] | None:
        """The most likely tokens and the one that was taken; of several with the same text, the most likely."""
        if one.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in (*one.top, (one.token, one.logprob)):
            found.setdefault(self._texts(token), _finite(logprob))
        return found


class ChatForm:
    """Makes choices of a chat.

    Args:
        texts: of tokens.
        top: number of the most likely tokens to tell; None where no log-probabilities are asked for.
    """

    def __init__(self, texts: TokenTexts, top: int | None) -> None:
        self._texts, self._top = texts, top

    def choice(self, part: Part) -> ChatChoice:
        """A whole turn."""
        message = ChatMessage(content=part.text)
        return ChatChoice(
            index=part.index, message=message, finish_reason=part.finish_reason, logprobs=self._logprobs(part)
        )

    def chunk(self, part: Part) -> ChatChunkChoice:
        """A piece of a turn."""
        delta = {"content": part.text} if part.text else {}
        return ChatChunkChoice(
            index=part.index, delta=delta, finish_reason=part.finish_reason, logprobs=self._logprobs(part)
        )

    def _logprobs(self, part: Part) -> ChatLogprobs | None:
        if self._top is None:
            return None
        return ChatLogprobs(
            content=[
                ChatLogprob(
                    **self._entry(one.token, one.logprob or 0.0),
                    top_logprobs=[TopLogprob(**self._entry(*other)) for other in one.top],
                )
                for one in part.logprobs
            ]
        )

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._texts(token)
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": whole}


def chat_opening(index: int) -> ChatChunkChoice:
    """What comes before the model's turn; it names the role."""
    return ChatChunkChoice(index=index, delta={"role": "assistant", "content": ""})


def as_event(event: BaseModel) -> str:
    """The text of a server-sent event."""
    return f"data: {event.model_dump_json()}\n\n"


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
