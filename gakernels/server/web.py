"""How requests are received and errors are sent: keys, sizes, slow clients, and counts.

Errors are reported as in the OpenAI interface: a status and {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import h11
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gakernels.server.context_store import StaleError
from gakernels.server.engine import BusyError
from gakernels.server.metrics import Metrics
from gakernels.server.settings import ApiKeys

logger = logging.getLogger(__name__)
OWNER = "gakernels.owner"  # in the scope of a request
_LEAST_SPEED = 1024  # bytes a second that a client must take


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The body in JSON types."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        message = str(self).encode("utf-8", "replace").decode()  # half a surrogate pair can't be encoded
        return ErrorBody(error=ErrorDetail(message=message, type=kind, param=self.param, code=self.code)).model_dump()

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(self.status)
        return JSONResponse(self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """The request is invalid, whoever sends it."""
    return ApiError(400, message, "invalid_value", param)


def not_json(content_type: str | None) -> ApiError:
    """The content type says that the body is not JSON."""
    found = "there is none" if content_type is None else f"it is {content_type[:100]!r}"
    return ApiError(415, f"the Content-Type must be application/json, but {found}", "unsupported_media_type")


def unauthorised() -> ApiError:
    """There is no valid key."""
    return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")


def no_such_context(identifier: str) -> ApiError:
    """There is none, or it is somebody else's: the answer is the same."""
    return ApiError(404, f"there is no context {identifier[:100]!r}", "context_not_found")


def no_such_model(name: str) -> ApiError:
    """There is none, or it is somebody else's context: the answer is the same."""
    return ApiError(404, f"there is no model {name[:100]!r}", "model_not_found", "model")


def no_such_route(request: Request) -> ApiError:
    """No route has that path; this includes the parts of OpenAI's interface that do not continue text."""
    there = "/v1/chat/completions, /v1/completions, /v1/models and /v1/contexts"
    what = f"{request.method} {request.url.path[:100]}"
    return ApiError(404, f"this server has no {what}, but {there}", "unknown_url")


def hung_up() -> ApiError:
    """Nobody reads this; the status, which is nginx's, is for the metrics."""
    return ApiError(499, "the client hung up before there was an answer", "hung_up")


def storage_error(error: OSError, what: str) -> ApiError:
    """The disk is full, can't be read, or is gone; the log says how."""
    logger.error("%s: %s", what, error)
    return ApiError(503, what, "storage_error")


def from_failure(error: Exception, model: str) -> ApiError:
    """The error to report for a failure on the way to an answer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(503, str(error), "overloaded")
    if isinstance(error, StaleError):
        return no_such_model(model)
    if isinstance(error, OSError):
        return storage_error(error, "the adapter could not be read or written")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error: see the server's log", "internal_error")


def add_handlers(app: FastAPI) -> None:
    """Make an app report every error this way."""

    @app.exception_handler(ApiError)
    async def _(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(BusyError)
    async def _(_: Request, error: BusyError) -> JSONResponse:
        return from_failure(error, "").response()

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        if isinstance(error.body, bytes):  # nothing has read it as JSON
            return not_json(request.headers.get("content-type")).response()
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return bad_request(f"{place or 'body'}: {first['msg']}", place[:100] or None).response()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        unknown = error.status_code == 404 and request.scope.get("route") is None
        response = (no_such_route(request) if unknown else ApiError(error.status_code, str(error.detail))).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "internal error: see the server's log", "internal_error").response()


RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is malformed or exceeds a limit."},
    401: {"model": ErrorBody, "description": "There is no valid API key."},
    413: {"model": ErrorBody, "description": "The request is too large."},
    415: {"model": ErrorBody, "description": "The Content-Type is not JSON."},
    503: {"model": ErrorBody, "description": "Too much is waiting; try again later."},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "There is no such context or model."}
}
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorBody, "description": "The context is not of the expected revision, or is empty."}
}


class KeysFirst:
    """Checks the key before reading the body: nobody without a key can fill the memory with bodies."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            found = self._keys.owner(key if kind.lower() == "bearer" else None)
            if found is None:
                await unauthorised().response()(scope, receive, send)
                return
            scope[OWNER] = found
        await self._app(scope, receive, send)


class ReadAsJson:
    """A body without a Content-Type is read as JSON, except from a web page, whose browser might send it unasked."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and not {b"content-type", b"origin"} & {name for name, _ in scope["headers"]}:
            scope["headers"] = [*scope["headers"], (b"content-type", b"application/json")]
        await self._app(scope, receive, send)


class Counted:
    """Counts requests and times them, by route, method and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, until its last byte is sent."""
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
            route = getattr(scope.get("route"), "path", "other")  # not the path itself: anybody could invent paths
            self._metrics.requests.labels(route, _method(scope), status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)


def _method(scope: Scope) -> str:
    method = str(scope["method"])
    return method if method in ("GET", "POST", "DELETE") else "other"


class BodyLimit:
    """Reads the whole request first, up to the limit, then passes it to the app.

    Args:
        app: the app behind it.
        limit: most bytes of a body.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client is gone
                return
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self._limit or _announced(scope) > self._limit:
                error = ApiError(413, f"a request may have {self._limit} bytes, but this one has more", "too_large")
                await error.response()(scope, receive, send)
                return
        body: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def replay() -> Message:
            return body.pop() if body else await receive()

        await self._app(scope, replay, send)


def _announced(scope: Scope) -> int:
    """The content length that the request declares; 0 if none."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with time limits for slow clients.

    A request must arrive, from its first byte to the last one of its body, within `patience` seconds, and so must the
    first byte of a new connection. The client must take at least 1 KiB of an answer per second. Slower ones are closed,
    with status 408 if it can still be sent. At most twice uvicorn's `limit_concurrency` connections are open; requests
    beyond `limit_concurrency` are answered with 503.

    Args:
        patience: the limit in seconds.
        options: uvicorn's options.
    """

    def __init__(self, *, patience: float, **options: Any) -> None:
        super().__init__(**options)
        self._patience = patience
        self._request_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > 2 * self.limit_concurrency:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=0)  # notifies as soon as the client takes less than it is sent
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._request_timer = _cancelled(self._request_timer)
        self._reader_timer = _cancelled(self._reader_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        super().data_received(data)
        self._await_request()

    def on_response_complete(self) -> None:
        """The answer is out."""
        super().on_response_complete()
        self._await_request()

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """It has taken everything."""
        super().resume_writing()
        self._reader_timer = _cancelled(self._reader_timer)

    def send_400_response(self, msg: str) -> None:
        """Answer that what arrived is not a request."""
        self._refuse(ApiError(400, "this is not an HTTP/1.1 request or has too large headers", "malformed_request"))

    def _await_request(self) -> None:
        """Run the timer while a request is incomplete, not while it is being answered."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._request_timer = _cancelled(self._request_timer)
        elif self._request_timer is None and not self.transport.is_closing():
            self._request_timer = self.loop.call_later(self._patience, self._give_up)

    def _give_up(self) -> None:
        begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(ApiError(408, f"the request must arrive within {self._patience:g} seconds", "timeout"))
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        content = json.dumps(error.body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_reader(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(self._patience, self._check_reader)

    def _check_reader(self) -> None:
        taken = self._unsent - self.transport.get_write_buffer_size()
        if taken < _LEAST_SPEED * self._patience:
            self.transport.abort()
        else:
            self._watch_reader()


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer that is no longer needed; returns None to replace it."""
    if timer is not None:
        timer.cancel()
    return None
