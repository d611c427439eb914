"""The web application: assembled from its parts, and run."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from gakernels.model import GenerativeAdapter
from gakernels.server.adapter_cache import AdapterCache
from gakernels.server.answers import Completions
from gakernels.server.completions import LocalCompletions
from gakernels.server.context_store import ContextStore
from gakernels.server.contexts import Contexts, context_routes, depends
from gakernels.server.engine import Engine
from gakernels.server.metrics import Metrics
from gakernels.server.openai_routes import openai_routes
from gakernels.server.pages import page_routes
from gakernels.server.process import allow_files, share_arenas
from gakernels.server.protocol import Health
from gakernels.server.settings import ApiKeys, Limits, Settings
from gakernels.server.vllm import VllmClient, VllmCompletions
from gakernels.server.web import (
    OWNER,
    RESPONSES,
    ApiError,
    BodyLimit,
    Counted,
    KeysFirst,
    PatientProtocol,
    ReadAsJson,
    add_handlers,
)
from gakernels.version import __version__

_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Parts:
    """The parts of a server.

    Attributes:
        base_name: name of the base model in requests.
        contexts: of the users.
        completions: computes the answers.
        engine: runs the model.
        keys: who may use it.
        limits: bounds on requests, contexts and queues.
        metrics: its counts.
        cors_origins: origins whose web pages may use it from a browser; `*` for all.
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

    The pages, /health, /metrics and /openapi.json need no key: they reveal no content and no names.
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
        return str(request.scope[OWNER])  # the bearer dependency is only for the schema

    store, contexts, metered = parts.contexts.store, parts.contexts, parts.metrics
    app.include_router(context_routes(contexts, metered, depends(owner)))
    app.include_router(
        openai_routes(parts.completions, contexts, metered, parts.base_name, int(time.time()), depends(owner))
    )
    app.include_router(page_routes())

    @app.get("/health", responses={503: RESPONSES[503]})
    async def health() -> Health:
        """Whether the server works."""
        if not parts.engine.alive:
            raise ApiError(503, "the engine has ended", "engine_ended")
        return Health(model=parts.base_name, contexts=len(store), damaged_contexts=len(store.damaged))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """The metrics in the text format of Prometheus."""
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


def assemble(model: GenerativeAdapter, settings: Settings) -> Parts:
    """The parts of a server. Call it in the event loop in which they will run.

    Raises:
        InputError: the folder is in use by another process, or the base model can't be decoded in batches.
        FormatError: the folder holds contexts made with another generator.
    """
    folder, metrics = settings.folder, Metrics()
    store = ContextStore(folder / "contexts", model.base_fingerprint(), model.generator_fingerprint())
    try:
        engine = Engine(model, settings.limits, settings.threads)
    except BaseException:
        store.close()
        raise
    cache = AdapterCache(
        model.device,
        settings.gpu_mebibytes * _MEBIBYTE,
        settings.cpu_mebibytes * _MEBIBYTE,
        settings.disk_mebibytes * _MEBIBYTE,
        folder / "adapters",
    )
    contexts = Contexts(model, engine, store, cache, settings.limits, folder / "exports")
    completions: Completions
    bridge = None
    if settings.vllm_url is None:
        completions = LocalCompletions(model, engine, contexts, settings.limits, metrics, settings.chat_template)
    else:
        client = VllmClient(settings.vllm_url, settings.vllm_key)
        completions = bridge = VllmCompletions(
            model, contexts, client, settings.base_name, folder / "peft", settings.vllm_adapters
        )

    async def close() -> None:
        if bridge is not None:
            await bridge.close()
        await asyncio.to_thread(engine.close)
        contexts.close()
        await asyncio.to_thread(cache.close)
        store.close()

    return Parts(
        settings.base_name,
        contexts,
        completions,
        engine,
        settings.keys,
        settings.limits,
        metrics,
        settings.cors_origins,
        close,
    )


async def serve(
    model: GenerativeAdapter,
    settings: Settings,
    host: str,
    port: int,
    ready: Callable[[str], object] = print,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a server until SIGINT, SIGTERM or `stop` ends it; requests that have begun are finished first.

    Args:
        model: the generator with its base model.
        settings: its settings.
        host: address to listen on.
        port: 0 for any free one.
        ready: called with the server's address once it listens.
        stop: ends the server when it is set.

    Raises:
        OSError: the address can't be used.
        InputError, FormatError: see `assemble`.
    """
    connections = 2 * settings.limits.waiting
    allow_files(2 * connections)
    share_arenas()
    with socket.create_server((host, port), family=_family(host)) as listener:
        parts = assemble(model, settings)
        config = uvicorn.Config(
            create_app(parts),
            log_level="warning",
            timeout_graceful_shutdown=30,
            server_header=False,
            limit_concurrency=connections,
            http=partial(PatientProtocol, patience=settings.patience),  # type: ignore[arg-type]
            ws="none",
        )
        name = f"[{host}]" if ":" in host else host
        ready(f"http://{name}:{listener.getsockname()[1]}")
        server = uvicorn.Server(config)
        watching = None if stop is None else asyncio.create_task(_end(server, stop))
        await server.serve(sockets=[listener])
        if watching is not None:
            watching.cancel()


async def _end(server: uvicorn.Server, stop: asyncio.Event) -> None:
    await stop.wait()
    server.should_exit = True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


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
    metrics.watch("gakernels_waiting", "Waiting prompts and appends.", lambda: parts.engine.waiting)
    metrics.watch("gakernels_adapter_misses_total", "Adapters made from states.", lambda: cache.misses)
    for name, what in (
        ("used_bytes", "Bytes of cached adapters"),
        ("limit_bytes", "Limit of cached adapters in bytes"),
        ("entries", "Cached adapters"),
        ("hits_total", "Adapters found in the cache"),
        ("evictions_total", "Adapters evicted from a tier"),
    ):
        read = partial(_by_tier, cache, name.removesuffix("_total"))
        metrics.watch(f"gakernels_adapter_cache_{name}", f"{what}, by tier.", read, "tier")


def _by_tier(cache: AdapterCache, name: str) -> dict[str, float]:
    return {tier: getattr(values, name) for tier, values in cache.tiers.items()}
