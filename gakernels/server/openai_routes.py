"""The routes of the OpenAI interface: models, completions and chat completions."""

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Request
from fastapi.params import Depends as Dependency
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from gakernels.server.api_errors import NOT_FOUND, RESPONSES, hung_up, no_such_model
from gakernels.server.context_store import Context, ContextStore
from gakernels.server.events import EventStream
from gakernels.server.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
)

_STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}
Answer = BaseModel | dict[str, Any] | EventStream


class Completions(Protocol):
    """What answers: this process's engine, or another server."""

    async def complete(self, request: CompletionRequest, context: Context | None) -> Answer:
        """The answer to a completion request, or the events of a stream."""

    async def chat(self, request: ChatRequest, context: Context | None) -> Answer:
        """The answer to a chat request, or the events of a stream."""


def openai_routes(
    completions: Completions, store: ContextStore, base_name: str, started: int, owner: Dependency
) -> APIRouter:
    """Models, completions and chat completions.

    Args:
        completions: answers.
        store: where contexts are; the id of one is the name of a model.
        base_name: name of the base model alone.
        started: seconds since 1970.
        owner: dependency that tells who sends a request.
    """
    router = APIRouter(prefix="/v1", tags=["openai"], responses=RESPONSES)

    def chosen(model: str, owner: str) -> Context | None:
        """The context that a request names, None for the base model."""
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
        """One of them."""
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
    """The answer, as soon as it is there. Raises: ApiError: the client hung up first; the work has been cancelled."""
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
    """A stream that is closed in the end, also if the client hangs up before the first event."""

    def __init__(self, stream: EventStream) -> None:
        super().__init__(stream.events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stream.close()
