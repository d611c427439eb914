"""Errors as the OpenAI interface tells them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gakernels.server.context_store import StaleError
from gakernels.server.engine import BusyError

logger = logging.getLogger(__name__)


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
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """As JSON types."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        message = str(self).encode("utf-8", "replace").decode()  # half a surrogate pair can't be sent
        return ErrorBody(error=ErrorDetail(message=message, type=kind, param=self.param, code=self.code)).model_dump()

    def response(self) -> JSONResponse:
        """As an answer."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(self.status)
        return JSONResponse(self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """The request can't be done, whoever sends it."""
    return ApiError(400, message, "invalid_value", param)


def not_json(content_type: str | None) -> ApiError:
    """The body is said to be something else."""
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


def hung_up() -> ApiError:
    """Nobody reads this; the number, which nginx uses for it, is for the metrics."""
    return ApiError(499, "the client hung up before there was an answer", "hung_up")


def storage_error(error: OSError, what: str) -> ApiError:
    """The disk is full, can't be read, or is gone; the log says how."""
    logger.error("%s: %s", what, error)
    return ApiError(503, what, "storage_error")


def from_failure(error: Exception, model: str) -> ApiError:
    """What to tell of a failure on the way to an answer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(503, str(error), "overloaded")
    if isinstance(error, StaleError):
        return no_such_model(model)
    if isinstance(error, OSError):
        return storage_error(error, "the adapter could not be read or written")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server could not do it; its log says why", "internal_error")


def add_handlers(app: FastAPI) -> None:
    """Have every error of an app told this way."""

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
    async def _(_: Request, error: HTTPException) -> JSONResponse:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "the server could not do it; its log says why", "internal_error").response()


RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is malformed or exceeds a limit."},
    401: {"model": ErrorBody, "description": "There is no valid API key."},
    413: {"model": ErrorBody, "description": "The request is too large."},
    415: {"model": ErrorBody, "description": "The body is not said to be JSON."},
    503: {"model": ErrorBody, "description": "Too much is waiting; try again later."},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "There is no such context or model."}
}
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorBody, "description": "The context is not of the expected revision, or is empty."}
}
