"""Puts a server together and runs it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvicorn

from gakernels.model import GenerativeAdapter
from gakernels.server.adapter_cache import AdapterCache
from gakernels.server.api import Parts, create_app
from gakernels.server.api_keys import ApiKeys
from gakernels.server.completions import LocalCompletions
from gakernels.server.connections import PatientProtocol
from gakernels.server.context_store import ContextStore
from gakernels.server.contexts import Contexts
from gakernels.server.engine import Engine
from gakernels.server.limits import Limits
from gakernels.server.metrics import Metrics
from gakernels.server.openai_routes import Completions
from gakernels.server.process import allow_files, share_arenas
from gakernels.server.vllm import VllmClient, VllmCompletions

_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Attributes:
        folder: for contexts, cached adapters and, with vLLM, PEFT folders.
        base_name: name of the base model in requests; with vLLM, the name that vLLM serves it under.
        limits: how much it takes on.
        keys: who may use it.
        gpu_mebibytes: of cached adapters on the GPU.
        cpu_mebibytes: of cached adapters in main memory.
        disk_mebibytes: of cached adapters on disk.
        threads: of the CPU operations; None for PyTorch's default.
        chat_template: Jinja template of a conversation; the tokenizer's own if not given.
        cors_origins: origins (`https://example.org`) whose web pages may use it from a browser; `*` for all.
        patience: seconds for a request to come in, see `PatientProtocol`.
        vllm_url: where a vLLM server that decodes is; None: this process decodes.
        vllm_key: API key of that server.
        vllm_adapters: most adapters registered with it at a time.
    """

    folder: Path
    base_name: str
    limits: Limits = field(default_factory=Limits)
    keys: ApiKeys = field(default_factory=ApiKeys)
    gpu_mebibytes: int = 4096
    cpu_mebibytes: int = 1024
    disk_mebibytes: int = 4096
    threads: int | None = None
    chat_template: str | None = None
    cors_origins: tuple[str, ...] = ()
    patience: float = 60.0
    vllm_url: str | None = None
    vllm_key: str | None = field(default=None, repr=False)
    vllm_adapters: int = 64


def assemble(model: GenerativeAdapter, settings: Settings) -> Parts:
    """The parts of a server. Called in the event loop that they will run in.

    Raises:
        InputError: the folder is in use by another process, or the base model can't be decoded in batches.
        FormatError: the folder holds contexts of another generator.
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
    """Run a server until it is told to end, by SIGINT or SIGTERM or `stop`: what has begun is finished first.

    Args:
        model: the generator with its base model.
        settings: how it is set up.
        host: address to listen on.
        port: 0 for any that is free.
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
