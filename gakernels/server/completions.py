"""Completions by this process's own engine: requests become rows, pieces of text become answers or events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from functools import partial

from pydantic import BaseModel

from gakernels.adapters.compact import CompactAdapter
from gakernels.data.chat_templates import chat_template
from gakernels.errors import InputError
from gakernels.generation.sampling import Sampling
from gakernels.generation.scheduler import Generation, Piece
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_text
from gakernels.model.positions import position_limit
from gakernels.server.api_errors import ApiError, bad_request
from gakernels.server.context_store import Context
from gakernels.server.contexts import Contexts
from gakernels.server.engine import Engine
from gakernels.server.events import (
    DONE,
    EventStream,
    as_event,
    chat_event,
    chat_opening,
    completion_event,
    finish_reason,
)
from gakernels.server.limits import Limits
from gakernels.server.metrics import Metrics
from gakernels.server.protocol import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    SamplingRequest,
)
from gakernels.server.rows import Rows


class LocalCompletions:
    """Answers completion and chat requests.

    Args:
        model: the base model with its generators.
        engine: decodes.
        contexts: where adapters come from.
        limits: of prompts and tokens.
        metrics: where tokens are counted.
        template: Jinja template of a conversation; the tokenizer's own if not given.
    """

    def __init__(
        self,
        model: GenerativeAdapter,
        engine: Engine,
        contexts: Contexts,
        limits: Limits,
        metrics: Metrics,
        template: str | None = None,
    ) -> None:
        self._engine, self._contexts, self._limits, self._metrics = engine, contexts, limits, metrics
        self._model, self._ends, self._template = model, model.end_tokens(), template
        settings = model.base.config.get_text_config()
        self._longest = position_limit(settings) or 2**31

    async def complete(self, request: CompletionRequest, context: Context | None) -> Completion | EventStream:
        """The answer, or the events of a stream. Raises: ApiError."""
        prompts = await self._encode(request.prompts())
        rows = self._start(request, prompts, [request.max_tokens] * len(prompts), context)
        frame = partial(Completion, id=_name("cmpl"), created=int(time.time()), model=request.model)
        if request.stream:
            return self._stream(rows, partial(completion_event, frame), frame, request.wants_usage)
        await self._finish(rows)
        choices = [
            CompletionChoice(index=index, text=row.text, finish_reason=finish_reason(row.finished))
            for index, row in enumerate(rows.generations)
        ]
        return frame(choices=choices, usage=rows.usage)

    async def chat(self, request: ChatRequest, context: Context | None) -> ChatCompletion | EventStream:
        """The answer, or the events of a stream. Raises: ApiError."""
        prompt = await self._contexts.with_text(partial(self._conversation, request))
        asked = request.max_completion_tokens or request.max_tokens
        room = min(self._longest, self._limits.cache_tokens) - len(prompt)
        wanted = max(1, min(self._limits.new_tokens, room)) if asked is None else asked
        rows = self._start(request, [prompt], [wanted], context)
        name, created = _name("chatcmpl"), int(time.time())
        if request.stream:
            frame = partial(ChatChunk, id=name, created=created, model=request.model)
            return self._stream(rows, partial(chat_event, frame), frame, request.wants_usage, chat_opening(frame))
        await self._finish(rows)
        row = rows.generations[0]
        choice = ChatChoice(index=0, message=ChatMessage(content=row.text), finish_reason=finish_reason(row.finished))
        return ChatCompletion(id=name, created=created, model=request.model, choices=[choice], usage=rows.usage)

    # Prompts

    async def _encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        if len(prompts) > self._limits.prompts:
            raise bad_request(f"a request may have {self._limits.prompts} prompts, not {len(prompts)}", "prompt")
        tokenizer = self._contexts.tokenizer

        def tokens(prompt: str | list[int]) -> list[int]:
            if not isinstance(prompt, str):
                return prompt
            if tokenizer is None:
                raise bad_request("this model has no tokenizer: prompts must be token ids", "prompt")
            return encode_text(tokenizer, prompt)

        return await self._contexts.with_text(lambda: [tokens(prompt) for prompt in prompts])

    def _conversation(self, request: ChatRequest) -> list[int]:
        tokenizer = self._contexts.tokenizer
        try:
            template = None if tokenizer is None else self._template or chat_template(tokenizer)
        except InputError as error:
            raise bad_request(f"{error}; start the server with --chat-template", "messages") from error
        if tokenizer is None or template is None:
            raise bad_request("this model has no chat template; start the server with --chat-template", "messages")
        messages = [message.model_dump() for message in request.messages]
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates refuse conversations that they don't know in ways of their own
            raise bad_request(f"the chat template refuses these messages: {error}", "messages") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    # Rows

    def _start(
        self,
        request: SamplingRequest,
        prompts: Sequence[list[int]],
        new_tokens: Sequence[int],
        context: Context | None,
    ) -> Rows:
        for prompt, count in zip(prompts, new_tokens, strict=True):
            self._check(prompt, count)
        self._check_ids(request.stop_token_ids or (), "stop_token_ids")
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

        def sink(index: int, piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        try:
            generations = [
                Generation(
                    prompt,
                    self._sampling(request, count),
                    self._adapter(context),
                    self._model.tokenizer,
                    self._ends,
                    partial(sink, index),
                )
                for index, (prompt, count) in enumerate(zip(prompts, new_tokens, strict=True))
            ]
        except InputError as error:
            raise bad_request(str(error)) from error
        rows = Rows(generations, pieces, request.model)
        try:
            for generation in generations:
                self._engine.submit(generation)
        except Exception:
            rows.cancel()
            raise
        self._metrics.prompt_tokens.add(rows.usage.prompt_tokens)
        return rows

    def _check(self, prompt: Sequence[int], new_tokens: int) -> None:
        if not prompt:
            raise bad_request("a prompt must have at least one token, but one has none", "prompt")
        self._check_ids(prompt, "prompt")
        if new_tokens > self._limits.new_tokens:
            raise bad_request(f"max_tokens may be {self._limits.new_tokens}, not {new_tokens}", "max_tokens")
        if len(prompt) + new_tokens > self._limits.cache_tokens:
            raise bad_request(f"prompt and max_tokens may be {self._limits.cache_tokens} tokens together", "max_tokens")
        if len(prompt) + new_tokens > self._longest:
            raise ApiError(
                400,
                f"the model reads {self._longest} tokens, but the prompt has {len(prompt)} and max_tokens is "
                f"{new_tokens}",
                "context_length_exceeded",
            )

    def _check_ids(self, tokens: Sequence[int], name: str) -> None:
        vocabulary = self._model.base.get_input_embeddings().num_embeddings
        wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise bad_request(f"{name}: token ids must be between 0 and {vocabulary - 1}, but one is {wrong}", name)

    def _adapter(self, context: Context | None) -> Callable[[], Future[CompactAdapter]] | None:
        return None if context is None or not context.revision else partial(self._contexts.adapter, context)

    def _sampling(self, request: SamplingRequest, new_tokens: int) -> Sampling:
        return Sampling(
            new_tokens,
            request.temperature,
            request.top_k,
            request.top_p,
            request.seed,
            request.stops(),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            skip_special_tokens=request.skip_special_tokens,
        )

    # Answers

    async def _finish(self, rows: Rows) -> None:
        try:
            async for _ in rows:
                pass
        finally:
            self._end(rows)

    def _end(self, rows: Rows) -> None:
        """Nobody waits for them any more."""
        rows.cancel()
        self._metrics.new_tokens.add(rows.usage.completion_tokens)

    def _stream(
        self,
        rows: Rows,
        event: Callable[[int, Piece], BaseModel],
        frame: Callable[..., BaseModel],
        wants_usage: bool,
        opening: BaseModel | None = None,
    ) -> EventStream:
        return EventStream(self._events(rows, event, frame, wants_usage, opening), partial(self._end, rows))

    @staticmethod
    async def _events(
        rows: Rows,
        event: Callable[[int, Piece], BaseModel],
        frame: Callable[..., BaseModel],
        wants_usage: bool,
        opening: BaseModel | None,
    ) -> AsyncGenerator[str, None]:
        """Server-sent events; an error that comes too late for a status is the last one."""
        if opening is not None:
            yield as_event(opening)
        try:
            async for index, piece in rows:
                if piece.text or piece.finished is not None:
                    yield as_event(event(index, piece))
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        if wants_usage:
            yield as_event(frame(choices=[], usage=rows.usage))
        yield DONE


def _name(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
