"""The routes of the OpenAI interface: models, completions and chat completions."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Protocol

from fastapi import APIRouter
from fastapi.params import Depends as Dependency
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from gakernels.serving.api_errors import NOT_FOUND, RESPONSES, no_such_model
from gakernels.serving.context_store import Context, ContextStore
from gakernels.serving.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
)

_STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}


class Completions(Protocol):
    """What answers: this process's engine, or another server."""

    async def complete(
        self, request: CompletionRequest, context: Context | None
    ) -> BaseModel | dict[str, Any] | AsyncIterator[str]:
        """The answer to a completion request, or the events of a stream."""

    async def chat(
        self, request: ChatRequest, context: Context | None
    ) -> BaseModel | dict[str, Any] | AsyncIterator[str]:
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
    async def complete(body: CompletionRequest, owner: Annotated[str, owner]) -> Response:
        """Continue prompts."""
        return _response(await completions.complete(body, chosen(body.model, owner)))

    @router.post("/chat/completions", response_model=ChatCompletion, responses=NOT_FOUND | {200: _STREAM})
    async def chat(body: ChatRequest, owner: Annotated[str, owner]) -> Response:
        """Continue a conversation."""
        return _response(await completions.chat(body, chosen(body.model, owner)))

    return router


def _response(answer: BaseModel | dict[str, Any] | AsyncIterator[str]) -> Response:
    if isinstance(answer, BaseModel):
        return JSONResponse(answer.model_dump())
    if isinstance(answer, dict):
        return JSONResponse(answer)
    return StreamingResponse(answer, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
