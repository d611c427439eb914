"""BodyLimit: a request that is too large is refused before it is in memory."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gakernels.server.api_errors import ApiError


class BodyLimit:
    """Reads the whole request first, as far as the limit, and then lets the app have it.

    Args:
        app: what is behind it.
        limit: most bytes of a body.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
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
    """The content length that the request names; 0 where it names none."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
