"""A bridge to a running vLLM server: adapters are made here, decoding is done there.

vLLM is started with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; its documentation (features/lora)
describes the two calls used here: /v1/load_lora_adapter and /v1/unload_lora_adapter. It reads the adapters from the
file system, so it must see this server's folder under the same path. Each revision of a context has its own name:
a name never changes its meaning, so nothing that vLLM has cached under it (such as the key-value blocks of a prompt)
can belong to an older state.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from gakernels.adapters.compact import CompactAdapter
from gakernels.generation.text_output import special_tokens
from gakernels.model import GenerativeAdapter
from gakernels.server.answers import EventStream, Source
from gakernels.server.context_store import Context
from gakernels.server.contexts import Contexts
from gakernels.server.protocol import ChatRequest, CompletionRequest, SamplingRequest
from gakernels.server.web import ApiError, from_failure

_TIMEOUT = httpx2.Timeout(600, connect=10)


class VllmClient:
    """A client for a vLLM server.

    Args:
        url: of the server, without /v1.
        key: its API key, if it has one.
        transport: for tests.
    """

    def __init__(self, url: str, key: str | None = None, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._http = httpx2.AsyncClient(
            base_url=url.rstrip("/"), headers=headers, timeout=_TIMEOUT, transport=transport, trust_env=False
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def load(self, name: str, path: Path) -> None:
        """Register an adapter. If vLLM has one of that name already, it is the same. Raises: ApiError."""
        response = await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        if response.is_error and "already been loaded" not in response.text:
            raise _refused(response, "vLLM did not load the adapter")

    async def unload(self, name: str) -> None:
        """Unregister an adapter; does nothing if vLLM does not have it. Raises: ApiError."""
        response = await self._post("/v1/unload_lora_adapter", {"lora_name": name})
        if response.is_error and response.status_code != 404:
            raise _refused(response, "vLLM did not unload the adapter")

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises: ApiError: with vLLM's own message if the request is at fault."""
        response = await self._post(path, body)
        if response.is_error:
            raise _refused(response, "vLLM did not answer")
        answer: dict[str, Any] = response.json()
        return answer

    @asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
        """The lines of a streamed answer. Raises: ApiError."""
        try:
            async with self._http.stream("POST", path, json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise _refused(response, "vLLM did not answer")
                yield response.aiter_lines()
        except httpx2.HTTPError as error:
            raise _unreachable(error) from error

    async def _post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        try:
            return await self._http.post(path, json=body)
        except httpx2.HTTPError as error:
            raise _unreachable(error) from error


class VllmCompletions:
    """Answers requests through a vLLM server on which the context's adapter is registered.

    Args:
        model: expands compact adapters.
        contexts: supplies the adapters.
        client: of the vLLM server.
        base_name: name under which vLLM serves the base model.
        folder: for PEFT folders, one for each registered adapter; leftovers of an earlier run are removed.
        most: most adapters registered at once; the least recently used one that is not in use goes first.
    """

    def __init__(
        self,
        model: GenerativeAdapter,
        contexts: Contexts,
        client: VllmClient,
        base_name: str,
        folder: Path,
        most: int = 64,
    ) -> None:
        self._model, self._contexts, self._client = model, contexts, client
        self._base_name, self._folder, self._most = base_name, folder.resolve(), most
        self._registered: OrderedDict[str, Context] = OrderedDict()
        self._in_use: dict[str, int] = {}
        self._lock = asyncio.Lock()  # adapters are registered one at a time
        shutil.rmtree(self._folder, ignore_errors=True)
        contexts.when_deleted(self._forget)

    async def complete(self, request: CompletionRequest, source: Source) -> dict[str, Any] | EventStream:
        """The answer to a completion request, or the events of a stream. Raises: ApiError."""
        return await self._forward("/v1/completions", request, source)

    async def chat(self, request: ChatRequest, source: Source) -> dict[str, Any] | EventStream:
        """The answer to a chat request, or the events of a stream. Raises: ApiError."""
        return await self._forward("/v1/chat/completions", request, source)

    async def close(self) -> None:
        """Unregister all adapters."""
        for name in list(self._registered):
            try:
                await self._client.unload(name)
            except ApiError:  # vLLM may have ended first
                break
        await self._client.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _forward(self, path: str, request: SamplingRequest, source: Source) -> dict[str, Any] | EventStream:
        body, context = request.model_dump(exclude_unset=True) | self._stop_ids(request), source.context
        if request.stream:
            return EventStream(self._events(path, body, request.model, source))
        async with self._name(context) as name:
            try:
                answer = await self._client.post(path, {**body, "model": name})
            except ApiError as error:
                if error.status != 404 or context is None:
                    raise
                await self._register(name, context)  # vLLM was restarted
                answer = await self._client.post(path, {**body, "model": name})
        return _told(answer, request.model, source)

    def _stop_ids(self, request: SamplingRequest) -> dict[str, list[int]]:
        """The ids of the stop texts that are special tokens, which vLLM finds by id."""
        tokenizer, stops = self._model.tokenizer, request.stops()
        special = {} if tokenizer is None or not stops else special_tokens(tokenizer)
        found = [number for number, text in special.items() if text in stops]
        return {"stop_token_ids": [*(request.stop_token_ids or ()), *found]} if found else {}

    async def _events(self, path: str, body: dict[str, Any], model: str, source: Source) -> AsyncGenerator[str, None]:
        """vLLM's events, with the model name that the user knows."""
        context = source.context
        try:
            async with self._name(context) as name:
                for again in (False, True):
                    try:
                        async with self._client.stream(path, {**body, "model": name}) as lines:
                            async for line in lines:
                                if line:
                                    yield f"{_told_in(line, model, source)}\n\n"
                        return
                    except ApiError as error:
                        if error.status != 404 or context is None or again:
                            raise
                        await self._register(name, context)  # vLLM was restarted
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"

    @asynccontextmanager
    async def _name(self, context: Context | None) -> AsyncIterator[str]:
        """vLLM's name for the present revision of a context; its adapter stays registered while the block runs."""
        if context is None or not context.revision:
            yield self._base_name
            return
        name = f"{context.id}-{context.revision}"
        self._in_use[name] = self._in_use.get(name, 0) + 1
        try:
            async with self._lock:
                if name not in self._registered:
                    await self._register(name, context)
                self._registered.move_to_end(name)
                await self._make_room(context)
            yield name
        finally:
            self._in_use[name] -= 1
            if not self._in_use[name]:
                del self._in_use[name]

    async def _register(self, name: str, context: Context) -> None:
        try:
            compact = await asyncio.wrap_future(self._contexts.adapter(context))
            path = self._folder / name
            await asyncio.to_thread(self._write, compact, path)
        except Exception as error:
            raise from_failure(error, context.id) from error
        self._registered[name] = context  # noted in advance: even if nobody waits any more, it is unregistered some day
        try:
            await self._client.load(name, path)
        except ApiError:
            del self._registered[name]
            raise

    def _write(self, compact: CompactAdapter, path: Path) -> None:
        self._model.expand(compact).save_peft(path, for_vllm=True)

    async def _make_room(self, newest: Context) -> None:
        """Unregister older revisions of a context, and the least recently used adapters beyond the limit."""
        idle = [name for name in self._registered if name not in self._in_use]
        old = [
            name
            for name in idle
            if self._registered[name].id == newest.id and self._registered[name].revision < newest.revision
        ]
        over = [name for name in idle if name not in old][: max(0, len(self._registered) - len(old) - self._most)]
        for name in [*old, *over]:
            await self._take_back(name)

    async def _forget(self, context: Context) -> None:
        """Unregister the adapters of a deleted context."""
        async with self._lock:
            for name in [name for name, known in self._registered.items() if known.id == context.id]:
                await self._take_back(name)

    async def _take_back(self, name: str) -> None:
        await self._client.unload(name)
        del self._registered[name]
        await asyncio.to_thread(shutil.rmtree, self._folder / name, True)


def _told(answer: dict[str, Any], model: str, source: Source) -> dict[str, Any]:
    """vLLM's answer or event, with the model name that the user knows and what the context took."""
    renamed = {**answer, "model": model} if "model" in answer else answer
    return {**renamed, "usage": {**renamed["usage"], **source.usage()}} if renamed.get("usage") else renamed


def _told_in(line: str, model: str, source: Source) -> str:
    """The same for a line of a stream."""
    kind, _, text = line.partition(": ")
    if kind != "data" or text.strip() == "[DONE]":
        return line
    return f"data: {json.dumps(_told(json.loads(text), model, source))}"


def _refused(response: httpx2.Response, what: str) -> ApiError:
    """vLLM's refusal: the user's mistake if vLLM says so, otherwise a failure of the upstream server."""
    try:
        answer = response.json()
        message = str(answer.get("error", answer).get("message"))
    except (ValueError, AttributeError):
        message = response.text[:200]
    if response.status_code in (400, 404, 422):
        return ApiError(404 if response.status_code == 404 else 400, f"{what}: {message}")
    return ApiError(502, f"{what} ({response.status_code}): {message}", "engine_error")


def _unreachable(error: Exception) -> ApiError:
    return ApiError(502, f"vLLM can't be reached: {type(error).__name__}", "engine_unreachable")
