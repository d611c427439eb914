"""The OpenAI interface: models, completions and chat. Requests become rows, and pieces of text answers or events."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Request
from fastapi.params import Depends as Dependency
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from gakernels.adapters.compact import CompactAdapter
from gakernels.data.chat import chat_template
from gakernels.errors import InputError
from gakernels.generation.sampling import Sampling
from gakernels.generation.scheduler import LENGTH, Generation, Piece
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_text
from gakernels.model.positions import position_limit
from gakernels.server.context_store import Context, ContextStore
from gakernels.server.contexts import Contexts
from gakernels.server.engine import Engine
from gakernels.server.metrics import Metrics
from gakernels.server.protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    FinishReason,
    ModelCard,
    ModelList,
    SamplingRequest,
    Usage,
)
from gakernels.server.settings import Limits
from gakernels.server.web import NOT_FOUND, RESPONSES, ApiError, bad_request, from_failure, hung_up, no_such_model

_DONE = "data: [DONE]\n\n"
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}


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

    async def complete(self, request: CompletionRequest, context: Context | None) -> Answer:
        """The answer to a completion request, or the events of a stream."""

    async def chat(self, request: ChatRequest, context: Context | None) -> Answer:
        """The answer to a chat request, or the events of a stream."""


@dataclass(frozen=True)
class Rows:
    """The generations that a request is waiting for.

    Attributes:
        generations: one for each prompt.
        pieces: queue of (number of the generation, piece), filled by the engine.
        model: the model's name in the request, for messages.
    """

    generations: list[Generation]
    pieces: asyncio.Queue[tuple[int, Piece]]
    model: str

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pairs (number of the row, piece), until all rows are finished.

        Raises:
            ApiError: a row failed.
        """
        unfinished = len(self.generations)
        try:
            while unfinished:
                index, piece = await self.pieces.get()
                if piece.error is not None:
                    raise from_failure(piece.error, self.model) from piece.error
                unfinished -= piece.finished is not None
                yield index, piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the rows at the next step; finished ones are not affected."""
        for generation in self.generations:
            generation.cancel()

    @property
    def usage(self) -> Usage:
        """The numbers of tokens so far."""
        return Usage.of(
            sum(len(row.prompt) for row in self.generations), sum(len(row.tokens) for row in self.generations)
        )


class LocalCompletions:
    """Answers completion and chat requests.

    Args:
        model: the base model with its generators.
        engine: decodes.
        contexts: where adapters come from.
        limits: on prompts and tokens.
        metrics: counts tokens.
        template: Jinja template of a conversation; by default the tokenizer's own.
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
        except Exception as error:  # each template raises its own errors for conversations that it refuses
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
        self._metrics.prompt_tokens.inc(rows.usage.prompt_tokens)
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
        """Cancel rows that nobody waits for any more."""
        rows.cancel()
        self._metrics.new_tokens.inc(rows.usage.completion_tokens)

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
        """Server-sent events; an error that comes too late for a status code is the last event."""
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
        yield _DONE


def _name(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def completion_event(frame: Callable[..., Completion], index: int, piece: Piece) -> Completion:
    """A piece of the completion of prompt number `index`; `frame` makes an event from its choices."""
    return frame(choices=[CompletionChoice(index=index, text=piece.text, finish_reason=finish_reason(piece.finished))])


def chat_event(frame: Callable[..., ChatChunk], index: int, piece: Piece) -> ChatChunk:
    """A piece of the model's turn."""
    delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
    return frame(choices=[ChatChunkChoice(index=index, delta=delta, finish_reason=finish_reason(piece.finished))])


def chat_opening(frame: Callable[..., ChatChunk]) -> ChatChunk:
    """The event before the model's turn; it names the role."""
    return frame(choices=[ChatChunkChoice(index=0, delta={"role": "assistant", "content": ""})])


def finish_reason(finished: str | None) -> FinishReason | None:
    """Why a text ended, in OpenAI's terms; None while it continues."""
    if finished is None:
        return None
    return "length" if finished == LENGTH else "stop"


def as_event(event: BaseModel) -> str:
    """The text of a server-sent event."""
    return f"data: {event.model_dump_json()}\n\n"


def openai_routes(
    completions: Completions, store: ContextStore, base_name: str, started: int, owner: Dependency
) -> APIRouter:
    """Models, completions and chat completions.

    Args:
        completions: computes the answers.
        store: holds the contexts; the id of a context is the name of a model.
        base_name: name of the base model alone.
        started: start time, seconds since 1970.
        owner: dependency that returns the sender of a request.
    """
    router = APIRouter(prefix="/v1", tags=["openai"], responses=RESPONSES)

    def chosen(model: str, owner: str) -> Context | None:
        """The context that a request names; None for the base model."""
        if model == base_name:
            return None
        context = store.get(model, owner)
        if context is None:
            raise no_such_model(model)
        return context

    def card(context: Context) -> ModelCard:
        return ModelCard(id=context.id, created=context.created, parent=base_name)

    base = ModelCard(id=base_name, created=started)

    @router.get("/models")
    async def models(owner: Annotated[str, owner]) -> ModelList:
        """The base model, and the user's contexts."""
        return ModelList(data=[base, *(card(context) for context in store.of(owner))])

    @router.get("/models/{name}", responses=NOT_FOUND)
    async def model(name: str, owner: Annotated[str, owner]) -> ModelCard:
        """One model."""
        context = chosen(name, owner)
        return base if context is None else card(context)

    @router.post("/completions", response_model=Completion, responses=NOT_FOUND | {200: _STREAM})
    async def complete(body: CompletionRequest, request: Request, owner: Annotated[str, owner]) -> Response:
        """Continue prompts."""
        return await _response(request, completions.complete(body, chosen(body.model, owner)))

    @router.post("/chat/completions", response_model=ChatCompletion, responses=NOT_FOUND | {200: _STREAM})
    async def chat(body: ChatRequest, request: Request, owner: Annotated[str, owner]) -> Response:
        """Continue a conversation."""
        return await _response(request, completions.chat(body, chosen(body.model, owner)))

    return router


async def _response(request: Request, work: Coroutine[Any, Any, Answer]) -> Response:
    """The answer, as soon as it is there. Raises: ApiError: the client hung up first; the work is then cancelled."""
    answering, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise hung_up()
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.wait({answering, leaving})
    answer = answering.result()
    if isinstance(answer, BaseModel):
        return JSONResponse(answer.model_dump())
    return _Events(answer) if isinstance(answer, EventStream) else JSONResponse(answer)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Events(StreamingResponse):
    """A stream that is always closed, even if the client hangs up before the first event."""

    def __init__(self, stream: EventStream) -> None:
        super().__init__(stream.events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stream.close()
