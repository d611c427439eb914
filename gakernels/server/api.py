"""The web application: routes, who may use them, and what is counted."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gakernels.server.adapter_cache import AdapterCache
from gakernels.server.api_errors import RESPONSES, ApiError, add_handlers, unauthorised
from gakernels.server.api_keys import ApiKeys
from gakernels.server.body_limit import BodyLimit
from gakernels.server.context_routes import context_routes, depends
from gakernels.server.contexts import Contexts
from gakernels.server.engine import Engine
from gakernels.server.limits import Limits
from gakernels.server.metrics import Labels, Metrics
from gakernels.server.openai_routes import Completions, openai_routes
from gakernels.server.protocol import Health
from gakernels.version import __version__

_OWNER = "gakernels.owner"  # in the scope of a request


@dataclass(frozen=True)
class Parts:
    """What a server is made of.

    Attributes:
        base_name: name of the base model in requests.
        contexts: of the users.
        completions: what answers.
        engine: runs the model.
        keys: who may use it.
        limits: how much it takes on.
        metrics: what it counts.
        cors_origins: web pages of these may use it from a browser; `*` for all.
        close: called when the server ends.
    """

    base_name: str
    contexts: Contexts
    completions: Completions
    engine: Engine
    keys: ApiKeys
    limits: Limits
    metrics: Metrics
    cors_origins: tuple[str, ...]
    close: Callable[[], Any]


def create_app(parts: Parts) -> FastAPI:
    """The application of a server.

    /health, /metrics and /openapi.json need no key: they show no content and no names.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await parts.close()

    app = FastAPI(
        title="gakernels", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False
    )
    bearer = HTTPBearer(auto_error=False)

    def owner(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, depends(bearer)]) -> str:
        return str(request.scope[_OWNER])  # the bearer itself is for the schema

    store = parts.contexts.store
    app.include_router(context_routes(parts.contexts, parts.metrics, depends(owner)))
    app.include_router(openai_routes(parts.completions, store, parts.base_name, int(time.time()), depends(owner)))

    @app.get("/health", responses={503: RESPONSES[503]})
    async def health() -> Health:
        """Whether the server does its work."""
        if not parts.engine.alive:
            raise ApiError(503, "the engine has ended", "engine_ended")
        return Health(model=parts.base_name, contexts=len(store), damaged_contexts=len(store.damaged))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """In the text format of Prometheus."""
        return PlainTextResponse(parts.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    add_handlers(app)
    app.add_middleware(ReadAsJson)
    app.add_middleware(BodyLimit, limit=parts.limits.body_bytes)
    app.add_middleware(KeysFirst, keys=parts.keys)
    if parts.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=parts.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Content-Disposition", "Retry-After"],
        )
    app.add_middleware(Counted, metrics=parts.metrics)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    _watch(parts)
    return app


class KeysFirst:
    """Asks for the key before anything of the body is read: who has none can't fill the memory with bodies."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            found = self._keys.owner(key if kind.lower() == "bearer" else None)
            if found is None:
                await unauthorised().response()(scope, receive, send)
                return
            scope[_OWNER] = found
        await self._app(scope, receive, send)


class ReadAsJson:
    """A body without a Content-Type is read as JSON, except a web page's, which a browser would send unasked."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and not {b"content-type", b"origin"} & {name for name, _ in scope["headers"]}:
            scope["headers"] = [*scope["headers"], (b"content-type", b"application/json")]
        await self._app(scope, receive, send)


class Counted:
    """Counts requests and times them, by route, method and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, until its last byte is out."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), "none"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # not the path itself: anybody may invent one
            self._metrics.requests.add(route=route, method=_method(scope), status=status)
            self._metrics.seconds.observe(time.perf_counter() - started, route=route)


def _method(scope: Scope) -> str:
    method = str(scope["method"])
    return method if method in ("GET", "POST", "DELETE") else "other"


def _schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI schema. Malformed requests are answered with 400, as OpenAI and vLLM do, not with FastAPI's 422."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in app.openapi_schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            app.openapi_schema["components"]["schemas"].pop(name, None)
    return app.openapi_schema


def _watch(parts: Parts) -> None:
    metrics, cache, store = parts.metrics, parts.contexts.cache, parts.contexts.store
    metrics.watch("gakernels_contexts", "Contexts on disk.", lambda: len(store))
    metrics.watch("gakernels_rows_running", "Prompts in the decoding batch.", lambda: parts.engine.running)
    metrics.watch("gakernels_waiting", "Prompts and appends that wait.", lambda: parts.engine.waiting)
    metrics.watch("gakernels_adapter_misses_total", "Adapters made from states.", lambda: cache.misses, "counter")
    for name, what, kind in (
        ("used_bytes", "Bytes of cached adapters", "gauge"),
        ("limit_bytes", "Bound of cached adapters in bytes", "gauge"),
        ("entries", "Cached adapters", "gauge"),
        ("hits", "Adapters found in the cache", "counter"),
        ("evictions", "Adapters pushed out of a tier", "counter"),
    ):
        full = f"gakernels_adapter_cache_{name}" + ("_total" if kind == "counter" else "")
        metrics.watch(full, f"{what}, by tier.", _by_tier(cache, name), kind)


def _by_tier(cache: AdapterCache, name: str) -> Callable[[], dict[Labels, float]]:
    return lambda: {(("tier", tier),): getattr(values, name) for tier, values in cache.tiers.items()}
