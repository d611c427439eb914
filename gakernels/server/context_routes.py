"""The routes of contexts."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Response
from fastapi.params import Depends as Dependency

from gakernels.server.api_errors import CONFLICT, NOT_FOUND, RESPONSES, bad_request
from gakernels.server.context_store import Context
from gakernels.server.contexts import Contexts
from gakernels.server.metrics import Metrics
from gakernels.server.protocol import AppendText, ContextInfo, ContextList, CreateContext, Deleted

_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "The file."}
}


def context_routes(contexts: Contexts, metrics: Metrics, owner: Dependency) -> APIRouter:
    """Create, list, read, append, export and delete.

    Args:
        contexts: does it.
        metrics: where tokens are counted.
        owner: dependency that tells who sends a request.
    """
    router = APIRouter(prefix="/v1/contexts", tags=["contexts"], responses=RESPONSES)

    def info(context: Context) -> ContextInfo:
        return ContextInfo(
            id=context.id,
            label=context.label,
            created=context.created,
            revision=context.revision,
            tokens_seen=context.tokens_seen,
            adapter_bytes=contexts.adapter_bytes if context.revision else 0,
        )

    @router.post("", status_code=201, responses=CONFLICT)
    async def create(body: CreateContext, owner: Annotated[str, owner]) -> ContextInfo:
        """A new context."""
        context = await contexts.create(owner, body.label, body.text)
        metrics.context_tokens.add(context.tokens_seen)
        return info(context)

    @router.get("")
    async def list_all(owner: Annotated[str, owner]) -> ContextList:
        """The user's contexts."""
        return ContextList(data=[info(context) for context in contexts.store.of(owner)])

    @router.get("/{identifier}", responses=NOT_FOUND)
    async def read(identifier: str, owner: Annotated[str, owner]) -> ContextInfo:
        """What is known about a context."""
        return info(contexts.get(identifier, owner))

    @router.post("/{identifier}/append", responses=NOT_FOUND | CONFLICT)
    async def append(identifier: str, body: AppendText, owner: Annotated[str, owner]) -> ContextInfo:
        """Read more of a context. When the answer comes, it is on disk."""
        more = body.text if body.tokens is None else body.tokens
        if more is None or (body.text is not None and body.tokens is not None):
            raise bad_request("give exactly one of text and tokens", "text")
        before = contexts.get(identifier, owner).tokens_seen
        context = await contexts.append(identifier, owner, more, body.revision)
        metrics.context_tokens.add(context.tokens_seen - before)
        return info(context)

    @router.get("/{identifier}/export", responses=NOT_FOUND | CONFLICT | _FILE, response_class=Response)
    async def export(
        identifier: str, owner: Annotated[str, owner], format: Literal["peft", "adapter", "compact"] = "peft"
    ) -> Response:
        """The context's adapter as a file: a zip archive of a PEFT folder, or this library's own."""
        name, content = await contexts.export(identifier, owner, format)
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(content, media_type="application/octet-stream", headers=headers)

    @router.delete("/{identifier}", responses=NOT_FOUND)
    async def delete(identifier: str, owner: Annotated[str, owner]) -> Deleted:
        """Remove a context for good."""
        await contexts.delete(identifier, owner)
        return Deleted(id=identifier)

    return router


def depends(function: Any) -> Dependency:
    """A dependency, as the routes take it."""
    dependency: Dependency = Depends(function)
    return dependency
