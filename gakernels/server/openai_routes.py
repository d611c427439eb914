"""The routes of the OpenAI interface: models, completions and chat completions."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.params import Depends as Dependency
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from gakernels.server.answers import Answer, Completions, EventStream, Source
from gakernels.server.context_store import Context
from gakernels.server.contexts import Contexts
from gakernels.server.metrics import Metrics
from gakernels.server.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
    SamplingRequest,
)
from gakernels.server.web import NOT_FOUND, RESPONSES, bad_request, hung_up, no_such_model

R = TypeVar("R", bound=SamplingRequest)
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}


def openai_routes(
    completions: Completions,
    contexts: Contexts,
    metrics: Metrics,
    base_name: str,
    started: int,
    owner: Dependency,
) -> APIRouter:
    """Models, completions and chat completions.

    Args:
        completions: computes the answers.
        contexts: the id of a context is the name of a model, and requests may bring texts of their own.
        metrics: counts tokens.
        base_name: name of the base model alone.
        started: start time, seconds since 1970.
        owner: dependency that returns the sender of a request.
    """
    router = APIRouter(prefix="/v1", tags=["openai"], responses=RESPONSES)
    store = contexts.store

    def chosen(model: str, owner: str) -> Context | None:
        """The context that a request names; None for the base model."""
        if model == base_name:
            return None
        context = store.get(model, owner)
        if context is None:
            raise no_such_model(model)
        return context

    async def answer(body: R, owner: str, compute: Callable[[R, Source], Coroutine[Any, Any, Answer]]) -> Answer:
        """The answer with the context that the request names or brings, which is kept as long as it is needed."""
        context, texts = chosen(body.model, owner), body.texts()
        if not texts:
            return await compute(body, Source(context))
        if context is not None:
            raise bad_request("model must be the base model if there is a context, but it names one itself", "context")
        context, read = await contexts.of_texts(owner, texts)
        metrics.context_tokens.inc(read)
        with ExitStack() as stack:
            stack.callback(contexts.release, context)
            found = await compute(body, Source(context, read))
            if isinstance(found, EventStream):
                stack.callback(found.end)  # called first
                return replace(found, end=stack.pop_all().close)
            return found

    def card(context: Context) -> ModelCard:
        return ModelCard(id=context.id, created=context.created, parent=base_name)

    base = ModelCard(id=base_name, created=started)

    @router.get("/models")
    async def models(owner: Annotated[str, owner]) -> ModelList:
        """The base model, and the user's contexts."""
        return ModelList(data=[base, *(card(context) for context in store.of(owner) if not context.fixed)])

    @router.get("/models/{name}", responses=NOT_FOUND)
    async def model(name: str, owner: Annotated[str, owner]) -> ModelCard:
        """One model."""
        context = chosen(name, owner)
        return base if context is None else card(context)

    @router.post("/completions", response_model=Completion, responses=NOT_FOUND | {200: _STREAM})
    async def complete(body: CompletionRequest, request: Request, owner: Annotated[str, owner]) -> Response:
        """Continue prompts."""
        return await _response(request, answer(body, owner, completions.complete))

    @router.post("/chat/completions", response_model=ChatCompletion, responses=NOT_FOUND | {200: _STREAM})
    async def chat(body: ChatRequest, request: Request, owner: Annotated[str, owner]) -> Response:
        """Continue a conversation."""
        return await _response(request, answer(body, owner, completions.chat))

    return router


async def _response(request: Request, work: Coroutine[Any, Any, Answer]) -> Response:
    """The answer, once it is ready. Raises: ApiError: the client disconnected first; the work is then cancelled."""
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
    """A stream that is always closed, even if the client disconnects before the first event."""

    def __init__(self, stream: EventStream) -> None:
        super().__init__(stream.events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stream.close()
