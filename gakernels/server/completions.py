"""Completions and chat by the engine of this process: requests become rows, and pieces of text answers or events."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from pydantic import BaseModel

from gakernels.adapters.compact import CompactAdapter
from gakernels.data.chat import chat_template
from gakernels.errors import InputError
from gakernels.generation.sampling import Sampling
from gakernels.generation.scheduler import Generation, Piece
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_text
from gakernels.model.positions import position_limit
from gakernels.server.answers import (
    ChatForm,
    CompletionForm,
    EventStream,
    Part,
    Source,
    TokenTexts,
    as_event,
    chat_opening,
    usage,
)
from gakernels.server.context_store import Context
from gakernels.server.contexts import Contexts
from gakernels.server.engine import Engine
from gakernels.server.metrics import Metrics
from gakernels.server.protocol import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    SamplingRequest,
    Usage,
)
from gakernels.server.settings import Limits
from gakernels.server.web import ApiError, bad_request, from_failure

_DONE = "data: [DONE]\n\n"
T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """The generations that a request is waiting for.

    Attributes:
        generations: the answers to each prompt, one prompt after the other.
        pieces: queue of (number of the generation, piece), filled by the engine.
        request: whose answers they are.
        source: where the adapter comes from.
        echoes: texts that the answers begin with; none, or one for each prompt.
    """

    generations: list[Generation]
    pieces: asyncio.Queue[tuple[int, Piece]]
    request: SamplingRequest
    source: Source
    echoes: Sequence[str] = ()

    async def __aiter__(self) -> AsyncIterator[Part]:
        """Parts of the answers, until all are finished.

        Raises:
            ApiError: a row failed.
        """
        unfinished = set(range(len(self.generations)))
        begun: set[int] = set()
        try:
            while unfinished:
                index, piece = await self.pieces.get()
                if piece.error is not None:
                    raise from_failure(piece.error, self.request.model) from piece.error
                if piece.finished is not None:
                    unfinished.remove(index)
                own = () if piece.logprob is None else (piece.logprob,)
                if index in begun:
                    yield Part(index, piece.text, own, piece.finished)
                else:
                    begun.add(index)
                    asked = self.generations[index].prompt_logprobs
                    yield Part(index, self._echo(index) + piece.text, (*asked, *own), piece.finished)
        finally:
            self.cancel()

    def wholes(self) -> list[Part]:
        """The answers, once they are finished."""
        return [
            Part(index, self._echo(index) + row.text, (*row.prompt_logprobs, *row.logprobs), row.finished)
            for index, row in enumerate(self.generations)
        ]

    def cancel(self) -> None:
        """End the rows at the next step; finished ones are not affected."""
        for generation in self.generations:
            generation.cancel()

    @property
    def usage(self) -> Usage:
        """The numbers of tokens so far."""
        prompts = sum(len(row.prompt) for row in self.generations[:: self.request.n])
        return usage(prompts, sum(len(row.tokens) for row in self.generations), self.source)

    def _echo(self, index: int) -> str:
        return self.echoes[index // self.request.n] if self.echoes else ""


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
        self._texts = TokenTexts(contexts.tokenizer)

    async def complete(self, request: CompletionRequest, source: Source) -> Completion | EventStream:
        """The answer, or the events of a stream. Raises: ApiError."""
        self._check_number(request, len(request.prompts()))
        prompts, echoes = await self._contexts.with_text(partial(self._encode, request))
        rows = self._start(request, prompts, request.max_tokens, source, echoes)
        frame = partial(Completion, id=_name("cmpl"), created=int(time.time()), model=request.model)
        form = CompletionForm(self._texts, request.most_likely)
        if request.stream:
            return self._stream(rows, lambda part: frame(choices=[form.choice(part)]), frame)
        return frame(choices=await self._finish(rows, form.choice), usage=rows.usage)

    async def chat(self, request: ChatRequest, source: Source) -> ChatCompletion | EventStream:
        """The answer, or the events of a stream. Raises: ApiError."""
        self._check_number(request, 1)
        prompt = await self._contexts.with_text(partial(self._conversation, request))
        asked = request.max_completion_tokens or request.max_tokens
        room = min(self._longest, self._limits.cache_tokens) - len(prompt)
        wanted = max(1, min(self._limits.new_tokens, room)) if asked is None else asked
        rows = self._start(request, [prompt], wanted, source)
        name, created = _name("chatcmpl"), int(time.time())
        form = ChatForm(self._texts, request.most_likely)
        if request.stream:
            frame = partial(ChatChunk, id=name, created=created, model=request.model)
            openings = [frame(choices=[chat_opening(index)]) for index in range(request.n)]
            return self._stream(rows, lambda part: frame(choices=[form.chunk(part)]), frame, openings)
        choices = await self._finish(rows, form.choice)
        return ChatCompletion(id=name, created=created, model=request.model, choices=choices, usage=rows.usage)

    # Prompts

    def _check_number(self, request: SamplingRequest, prompts: int) -> None:
        if prompts * request.n > self._limits.prompts:
            many = f"{prompts}" if request.n == 1 else f"{prompts} with {request.n} answers each"
            raise bad_request(
                f"a request may have {self._limits.prompts} prompts, not {many}", "prompt" if request.n == 1 else "n"
            )

    def _encode(self, request: CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """The prompts' tokens, and their texts if the request wants them back. Run it with the tokenizer."""
        tokenizer = self._contexts.tokenizer

        def tokens(prompt: str | list[int]) -> list[int]:
            if not isinstance(prompt, str):
                return prompt
            if tokenizer is None:
                raise bad_request("this model has no tokenizer: prompts must be token ids", "prompt")
            return encode_text(tokenizer, prompt)

        def text(prompt: str | list[int]) -> str:
            if isinstance(prompt, str) or tokenizer is None:
                return prompt if isinstance(prompt, str) else ""
            self._check_ids(prompt, "prompt")
            return str(tokenizer.decode(prompt, skip_special_tokens=request.skip_special_tokens))

        prompts = request.prompts()
        return [tokens(prompt) for prompt in prompts], [text(prompt) for prompt in prompts] if request.echo else []

    def _conversation(self, request: ChatRequest) -> list[int]:
        tokenizer = self._contexts.tokenizer
        try:
            template = None if tokenizer is None else self._template or chat_template(tokenizer)
        except InputError as error:
            raise bad_request(f"{error}; start the server with --chat-template", "messages") from error
        if tokenizer is None or template is None:
            raise bad_request("this model has no chat template; start the server with --chat-template", "messages")
        messages = [message.model_dump(exclude_none=True) for message in request.messages]
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
        new_tokens: int,
        source: Source,
        echoes: Sequence[str] = (),
    ) -> Rows:
        for prompt in prompts:
            self._check(prompt, new_tokens)
        self._check_ids(request.stop_token_ids or (), "stop_token_ids")
        self._check_ids(list(request.logit_bias), "logit_bias")
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

        def sink(index: int, piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        asked = [(prompt, answer) for prompt in prompts for answer in range(request.n)]
        try:
            generations = [
                Generation(
                    prompt,
                    self._sampling(request, new_tokens, answer, bool(echoes)),
                    self._adapter(source.context),
                    self._model.tokenizer,
                    self._ends,
                    partial(sink, index),
                )
                for index, (prompt, answer) in enumerate(asked)
            ]
        except InputError as error:
            raise bad_request(str(error)) from error
        rows = Rows(generations, pieces, request, source, echoes)
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

    def _sampling(self, request: SamplingRequest, new_tokens: int, answer: int, echo: bool) -> Sampling:
        """How to draw the answer of that number to a prompt."""
        return Sampling(
            new_tokens,
            request.temperature,
            request.top_k,
            request.top_p,
            None if request.seed is None else request.seed + answer,
            request.stops(),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            skip_special_tokens=request.skip_special_tokens,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=tuple(request.logit_bias.items()),
            logprobs=request.most_likely,
            prompt_logprobs=echo and request.most_likely is not None,
        )

    # Answers

    async def _finish(self, rows: Rows, choice: Callable[[Part], T]) -> list[T]:
        """Wait for the answers, and make choices of them."""
        try:
            async for _ in rows:
                pass
        finally:
            self._end(rows)
        return [await self._formed(choice, part) for part in rows.wholes()]

    async def _formed(self, form: Callable[[Part], T], part: Part) -> T:
        """Give a part its form; where that takes the texts of single tokens, in the tokenizer's thread."""
        return await self._contexts.with_text(partial(form, part)) if part.logprobs else form(part)

    def _end(self, rows: Rows) -> None:
        """Cancel rows that nobody waits for any more."""
        rows.cancel()
        self._metrics.new_tokens.inc(rows.usage.completion_tokens)

    def _stream(
        self,
        rows: Rows,
        event: Callable[[Part], BaseModel],
        frame: Callable[..., BaseModel],
        openings: Sequence[BaseModel] = (),
    ) -> EventStream:
        return EventStream(self._events(rows, event, frame, openings), partial(self._end, rows))

    async def _events(
        self,
        rows: Rows,
        event: Callable[[Part], BaseModel],
        frame: Callable[..., BaseModel],
        openings: Sequence[BaseModel],
    ) -> AsyncGenerator[str, None]:
        """Server-sent events; an error that comes too late for a status code is the last event."""
        for opening in openings:
            yield as_event(opening)
        try:
            async for part in rows:
                if part.text or part.logprobs or part.finished is not None:
                    yield as_event(await self._formed(event, part))
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        if rows.request.wants_usage:
            yield as_event(frame(choices=[], usage=rows.usage))
        yield _DONE


def _name(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
