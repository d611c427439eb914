"""Contexts: operations of users on their contexts, on top of the store, the engine and the cache."""

import asyncio
import copy
import io
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Response
from fastapi.params import Depends as Dependency
from torch import Tensor

from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_context
from gakernels.model.state_arithmetic import sum_states
from gakernels.server.adapter_cache import AdapterCache
from gakernels.server.context_store import Context, ContextStore, StaleError, text_identifier
from gakernels.server.engine import Engine
from gakernels.server.metrics import Metrics
from gakernels.server.protocol import (
    AppendText,
    ComposeContexts,
    ContextInfo,
    ContextList,
    CreateContext,
    Deleted,
    RenameContext,
)
from gakernels.server.settings import Limits
from gakernels.server.text_contexts import TextContexts
from gakernels.server.web import (
    CONFLICT,
    NOT_FOUND,
    RESPONSES,
    ApiError,
    bad_request,
    no_such_context,
    storage_error,
)

T = TypeVar("T")
_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "The file."}
}


class Contexts:
    """Create, append, compose, rename, read, export, delete. Belongs to one event loop.

    Appends to one context run one after the other; the states of a context depend only on its own appends, since each
    append is encoded separately, never in a batch with another.

    Args:
        model: its tokenizer turns texts into tokens.
        engine: runs the forward passes.
        store: is authoritative about contexts.
        cache: of the adapters computed from the states.
        limits: on contexts and appends.
        scratch: folder for exports in preparation; leftovers of an earlier run are removed.
    """

    def __init__(
        self,
        model: GenerativeAdapter,
        engine: Engine,
        store: ContextStore,
        cache: AdapterCache,
        limits: Limits,
        scratch: Path,
    ) -> None:
        self.store, self.cache, self._scratch = store, cache, scratch
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self._model, self._engine, self._limits = model, engine, limits
        # A copy for this object's one thread: tokenizers are not thread-safe.
        self.tokenizer = copy.deepcopy(model.tokenizer)
        self._text_thread = ThreadPoolExecutor(1, "gakernels-text")
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._creating = asyncio.Lock()
        self._texts = TextContexts()
        self._in_memory = asyncio.Semaphore(2)  # exports and sums
        self._deleted: list[Callable[[Context], Awaitable[None]]] = []
        self.adapter_bytes = _adapter_bytes(model)

    def when_deleted(self, callback: Callable[[Context], Awaitable[None]]) -> None:
        """Call a function after a context has been deleted."""
        self._deleted.append(callback)

    def close(self) -> None:
        """End the thread."""
        self._text_thread.shutdown()

    async def with_text(self, function: Callable[[], T]) -> T:
        """Run a function that uses the tokenizer."""
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, function)

    def get(self, identifier: str, owner: str) -> Context:
        """The user's context. Raises: ApiError: there is no such context, or it is somebody else's."""
        context = self.store.get(identifier, owner)
        if context is None:
            raise no_such_context(identifier)
        return context

    async def create(self, owner: str, label: str, text: str | None) -> Context:
        """A new context, with a first text if one is given; it is on disk when this returns.

        Raises:
            ApiError: there are too many contexts, or the text can't be read; then no context is created.
        """
        tokens = None if text is None else await self._encode(text, first=True)
        context = await self._create(owner, label)
        if tokens is None:
            return context
        try:
            return await self.append(context.id, owner, tokens, None)
        except Exception:
            await self.delete(context.id, owner)
            raise

    async def compose(self, owner: str, label: str, identifiers: Sequence[str]) -> Context:
        """A new context whose state is the sum of others' states (equation 3); it is on disk when this returns.

        Raises:
            ApiError: there is no such context, one is empty or changes meanwhile, they have too many tokens together,
                or there are too many contexts.
        """
        parts = [self._filled(identifier, owner) for identifier in identifiers]
        tokens = sum(part.tokens_seen for part in parts)
        self._check_length(tokens)
        async with self._in_memory:
            try:
                with _storage("a context could not be read"):
                    states = await asyncio.to_thread(lambda: sum_states([self.store.states(part) for part in parts]))
            except StaleError as error:
                raise ApiError(409, "one of the contexts has just changed; try again", "wrong_revision") from error
            context = await self._create(owner, label, None, states, tokens)
        self.adapter(context)  # ahead of time
        return context

    async def rename(self, identifier: str, owner: str, label: str) -> Context:
        """Give a context another label. Raises: ApiError: there is no such context, or it changes meanwhile."""
        self.get(identifier, owner)
        async with self._lock(identifier):
            context = self.get(identifier, owner)
            try:
                with _storage("the context could not be written; it is as it was before"):
                    return await asyncio.to_thread(self.store.rename, context, label)
            except StaleError as error:
                raise self._changed(identifier, owner) from error

    async def of_texts(self, owner: str, texts: Sequence[str]) -> tuple[Context, int]:
        """The context of some texts, read one after the other, and how many tokens of it were read just now.

        It has been read if the same user brought the same texts before; reading that was interrupted is continued. It
        stays until `release`; after that it may make room for another.

        Raises:
            ApiError: there are too many contexts, or a text can't be read.
        """
        identifier = text_identifier(owner, texts)
        self._texts.hold(identifier)
        try:
            async with self._lock(f"{identifier} texts"):
                return await self._of_texts(identifier, owner, texts)
        except BaseException:
            self._texts.release(identifier)
            raise

    def release(self, context: Context) -> None:
        """A request does not need the context of its texts any more."""
        self._texts.release(context.id)

    async def _of_texts(self, identifier: str, owner: str, texts: Sequence[str]) -> tuple[Context, int]:
        context = self.store.get(identifier, owner)
        if context is not None and context.revision == len(texts):
            return context, 0
        tokens = [await self._encode(text, first=number == 0) for number, text in enumerate(texts)]
        self._check_length(sum(map(len, tokens)))
        if context is None:
            context = await self._create(owner, "", identifier)
        before = context.tokens_seen
        for revision in range(context.revision, len(texts)):
            context = await self.append(identifier, owner, tokens[revision], revision)
        return context, context.tokens_seen - before

    async def _create(
        self,
        owner: str,
        label: str,
        identifier: str | None = None,
        states: Mapping[str, Tensor] | None = None,
        tokens: int = 0,
    ) -> Context:
        """A context, empty or with states; one that a request brought with it goes if there are too many."""
        async with self._creating:
            while self._full(owner):
                oldest = self._texts.dispensable(self.store.of(owner))
                if oldest is None:
                    message = "the limit of contexts is reached; delete one first"
                    raise ApiError(409, message, "too_many_contexts")
                await self._dispense(oldest)
            with _storage("the context could not be written"):
                return await asyncio.to_thread(self.store.create, owner, label, identifier, states, tokens)

    async def _dispense(self, context: Context) -> None:
        """Remove a context of texts that no request uses; one that asks for it now waits, and reads the texts again."""
        async with self._lock(f"{context.id} texts"):
            try:
                await self.delete(context.id, context.owner)
            except ApiError as error:
                if error.status != 404:  # its owner was faster
                    raise

    def _full(self, owner: str) -> bool:
        limits = self._limits
        return len(self.store) >= limits.contexts or len(self.store.of(owner)) >= limits.contexts_per_key

    async def append(self, identifier: str, owner: str, more: str | Sequence[int], revision: int | None) -> Context:
        """Read more of a context; it is on disk when this returns.

        Args:
            identifier: of the context.
            owner: the user.
            more: text or token ids.
            revision: the append is refused if the context has another revision.

        Raises:
            ApiError: there is no such context, it has another revision, or the text can't be read.
        """
        self.get(identifier, owner)
        # Once begun, it is completed even if the client goes away.
        return await asyncio.shield(asyncio.create_task(self._append(identifier, owner, more, revision)))

    async def _append(self, identifier: str, owner: str, more: str | Sequence[int], revision: int | None) -> Context:
        async with self._lock(identifier):
            context = self.get(identifier, owner)
            if revision is not None and revision != context.revision:
                raise ApiError(409, f"the context has revision {context.revision}, not {revision}", "wrong_revision")
            tokens = await self._encode(more, first=context.tokens_seen == 0)
            self._check_length(context.tokens_seen + len(tokens))
            try:
                with _storage("the context could not be read"):
                    before = await asyncio.to_thread(self._states, context)
                work = self._engine.work(lambda: self._passes(tokens, before))
                after = await asyncio.wrap_future(work)
                with _storage("the context could not be written; it is as it was before"):
                    new = await asyncio.to_thread(self.store.commit, context, after, len(tokens))
            except StaleError as error:
                raise self._changed(identifier, owner) from error
            for name in (_key(context), _key(new)):  # the new key may exist from before a backup was restored
                await asyncio.to_thread(self.cache.drop, name)
            self.adapter(new)  # ahead of time
        return new

    async def delete(self, identifier: str, owner: str) -> None:
        """Remove a context and everything made from it. Raises: ApiError: there is no such context."""
        self.get(
            identifier, owner
        )  # before the lock: nobody may learn that somebody else's context is being appended to
        async with self._lock(identifier):
            context = self.get(identifier, owner)
            with _storage("the context could not be removed"):
                await asyncio.to_thread(self.store.delete, context)
            await asyncio.to_thread(self.cache.drop, _key(context))
        self._texts.forget(identifier)
        for callback in self._deleted:
            await callback(context)

    async def export(self, identifier: str, owner: str, form: str) -> tuple[str, bytes]:
        """Name and content of a file with the context's adapter.

        Args:
            identifier: of the context.
            owner: the user.
            form: `compact` and `adapter`: this library's files; `peft`: a zip archive of a PEFT folder; `gguf`: a file
                for llama.cpp.

        Raises:
            ApiError: there is no such context, it is empty, or it can't be written in this form.
        """
        context = self._filled(identifier, owner)
        async with self._in_memory:
            try:
                with _storage("the adapter could not be written"):
                    compact = await asyncio.wrap_future(self.adapter(context))
                    return await asyncio.to_thread(self._export, f"{context.id}-{context.revision}", compact, form)
            except StaleError:
                raise no_such_context(identifier) from None

    def adapter(self, context: Context) -> Future[CompactAdapter]:
        """Start bringing the context's present adapter to the device.

        The future raises StaleError if the context has been deleted.
        """
        outcome: Future[CompactAdapter] = Future()
        outcome.set_running_or_notify_cancel()  # whoever waits may go away, but not cancel it
        self._bring(context, outcome)
        return outcome

    # Steps

    def _filled(self, identifier: str, owner: str) -> Context:
        """The user's context. Raises: ApiError: there is no such context, or it is empty."""
        context = self.get(identifier, owner)
        if not context.revision:
            raise ApiError(409, "the context is empty; append to it first", "empty_context")
        return context

    def _check_length(self, tokens: int) -> None:
        if tokens > self._limits.context_tokens:
            raise bad_request(f"a context may have {self._limits.context_tokens} tokens; this would be more")

    def _changed(self, identifier: str, owner: str) -> ApiError:
        """Somebody has changed a context's file. Raises: ApiError: it is gone."""
        now = self.get(identifier, owner)
        return ApiError(409, f"the context has revision {now.revision}", "wrong_revision")

    def _bring(self, context: Context, outcome: Future[CompactAdapter]) -> None:
        """The adapter goes into `outcome`. Methods: functions that name each other are a cycle, which would hold it."""
        current = self.store.get(context.id, context.owner)
        if current is None:
            outcome.set_exception(StaleError(f"context {context.id} has been deleted"))
            return
        found = self.cache.request(_key(current), partial(self._make, current))
        found.add_done_callback(partial(self._brought, context, outcome))

    def _brought(self, context: Context, outcome: Future[CompactAdapter], found: Future[CompactAdapter]) -> None:
        error = found.exception()
        if isinstance(error, StaleError):  # an append came in between
            self._bring(context, outcome)
        elif error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(found.result())

    def _lock(self, identifier: str) -> asyncio.Lock:
        """One lock for each context in use; removed when nobody holds it."""
        lock = self._locks.get(identifier)
        if lock is None:
            lock = self._locks[identifier] = asyncio.Lock()
        return lock

    async def _encode(self, more: str | Sequence[int], first: bool) -> list[int]:
        try:
            tokens = await self.with_text(lambda: encode_context(self.tokenizer, more, first))
        except InputError as error:
            raise bad_request(str(error)) from error
        if not tokens:
            raise bad_request("the text must have at least one token, but it has none")
        if len(tokens) > self._limits.append_tokens:
            raise bad_request(f"an append may have {self._limits.append_tokens} tokens, but this has {len(tokens)}")
        vocabulary = self._model.base.get_input_embeddings().num_embeddings
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise bad_request(f"token ids must be between 0 and {vocabulary - 1}", "tokens")
        return tokens

    def _states(self, context: Context) -> dict[str, Tensor]:
        """The context's states, on the devices of its generators."""
        return {
            name: state.to(self._model.generator(name).sketch.device)
            for name, state in self.store.states(context).items()
        }

    def _passes(self, tokens: list[int], before: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        return self._model.passes([tokens], before or None)

    def _make(self, context: Context) -> CompactAdapter:
        """The compact adapter in the base model's dtype; one context at a time, for reproducible results."""
        states = self._states(context)
        return self._model.compact_adapters(states, [context.tokens_seen], self._model.base.dtype)[0]

    def _export(self, name: str, compact: CompactAdapter, form: str) -> tuple[str, bytes]:
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            path = Path(folder) / "adapter"
            if form == "compact":
                compact.to("cpu").save(path)
                return f"{name}.compact.safetensors", path.read_bytes()
            adapter = self._model.expand(compact)
            if form == "adapter":
                adapter.save(path)
                return f"{name}.safetensors", path.read_bytes()
            if form == "gguf":
                try:
                    adapter.save_gguf(path)
                except InputError as error:  # llama.cpp has no such model, or the package is not installed
                    raise bad_request(str(error), "format") from error
                return f"{name}.gguf", path.read_bytes()
            adapter.save_peft(path)
            return f"{name}.peft.zip", _zipped(path)


@contextmanager
def _storage(what: str) -> Iterator[None]:
    """Turn disk errors into answers: they are not defects of the server."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, what) from error


def _key(context: Context) -> str:
    return f"{context.id}-{context.revision}"


def _adapter_bytes(model: GenerativeAdapter) -> int:
    """The size of a compact adapter: U and V of every layer, in the base model's dtype."""
    settings = model.config
    return 2 * settings.state_size * settings.rank * len(model.adapted_names) * model.base.dtype.itemsize


def _zipped(folder: Path) -> bytes:
    """An archive of a folder's files, not compressed: the factors would not get smaller."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return buffer.getvalue()


def context_routes(contexts: Contexts, metrics: Metrics, owner: Dependency) -> APIRouter:
    """The routes to create, compose, list, read, rename, append to, export and delete contexts.

    Args:
        contexts: carries them out.
        metrics: counts tokens.
        owner: dependency that returns the sender of a request.
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
        metrics.context_tokens.inc(context.tokens_seen)
        return info(context)

    @router.get("")
    async def list_all(owner: Annotated[str, owner]) -> ContextList:
        """The user's contexts."""
        return ContextList(data=[info(context) for context in contexts.store.of(owner)])

    @router.post("/compose", status_code=201, responses=NOT_FOUND | CONFLICT)
    async def compose(body: ComposeContexts, owner: Annotated[str, owner]) -> ContextInfo:
        """A new context that holds what several others hold: the sum of their states."""
        return info(await contexts.compose(owner, body.label, body.contexts))

    @router.get("/{identifier}", responses=NOT_FOUND)
    async def read(identifier: str, owner: Annotated[str, owner]) -> ContextInfo:
        """The details of a context."""
        return info(contexts.get(identifier, owner))

    @router.post("/{identifier}", responses=NOT_FOUND | CONFLICT)
    async def rename(identifier: str, body: RenameContext, owner: Annotated[str, owner]) -> ContextInfo:
        """Give a context another label."""
        return info(await contexts.rename(identifier, owner, body.label))

    @router.post("/{identifier}/append", responses=NOT_FOUND | CONFLICT)
    async def append(identifier: str, body: AppendText, owner: Annotated[str, owner]) -> ContextInfo:
        """Read more of a context. It is on disk before the answer is sent."""
        more = body.text if body.tokens is None else body.tokens
        if more is None or (body.text is not None and body.tokens is not None):
            raise bad_request("give exactly one of text and tokens", "text")
        before = contexts.get(identifier, owner)
        if before.fixed:
            raise ApiError(409, "the context stands for the texts of a request: nothing can be appended", "fixed")
        context = await contexts.append(identifier, owner, more, body.revision)
        metrics.context_tokens.inc(context.tokens_seen - before.tokens_seen)
        return info(context)

    @router.get("/{identifier}/export", responses=NOT_FOUND | CONFLICT | _FILE, response_class=Response)
    async def export(
        identifier: str, owner: Annotated[str, owner], format: Literal["peft", "gguf", "adapter", "compact"] = "peft"
    ) -> Response:
        """The context's adapter as a file: a zip archive of a PEFT folder, one for llama.cpp, or this library's own."""
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
    """A dependency in the form that routes accept."""
    dependency: Dependency = Depends(function)
    return dependency
