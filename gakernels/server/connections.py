"""Connections that don't wait for ever: neither for a request that does not come to an end, nor for a slow reader."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gakernels.server.api_errors import ApiError

_LEAST_SPEED = 1024  # bytes a second that a client must take


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with an end to its patience.

    A request must be there, from its first byte to the last one of its body, within `patience` seconds, and so must the
    first byte of a new connection. Of an answer the client must take at least 1 KiB a second. What is slower is closed,
    with status 408 where that can still be told. The most connections that are open are twice uvicorn's
    `limit_concurrency`, beyond which requests are answered with 503.

    Args:
        patience: seconds.
        options: uvicorn's.
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
        transport.set_write_buffer_limits(high=0)  # to be told as soon as the client takes less than it is sent
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
        """Tell that what came is no request."""
        self._refuse(ApiError(400, "this is no HTTP/1.1 request, or its headers are too large", "malformed_request"))

    def _await_request(self) -> None:
        """Have the time run while a request is not complete, and not while it is being answered."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._request_timer = _cancelled(self._request_timer)
        elif self._request_timer is None and not self.transport.is_closing():
            self._request_timer = self.loop.call_later(self._patience, self._give_up)

    def _give_up(self) -> None:
        begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(ApiError(408, f"the request must be there within {self._patience:g} seconds", "timeout"))
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
    """What takes the place of a timer that is not needed any more: none."""
    if timer is not None:
        timer.cancel()
    return None
