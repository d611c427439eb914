"""Clients that are slow, silent or too many: they are let go of in time, and the others are served."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from loopback import served

from gakernels import GenerativeAdapter
from gakernels.generation import scheduler
from gakernels.server.server import allow_files
from gakernels.server.settings import Limits

PATIENCE = 0.6  # seconds
BODY = json.dumps({"model": "demo", "prompt": "The", "max_tokens": 1}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)


@pytest.fixture
def start(demo: GenerativeAdapter, tmp_path: Path) -> Iterator[Callable[..., httpx2.Client]]:
    with ExitStack() as stack:

        def start(**settings: Any) -> httpx2.Client:
            url = stack.enter_context(served(demo, tmp_path / "data", **{"patience": PATIENCE, **settings}))
            return stack.enter_context(httpx2.Client(base_url=url, timeout=60, trust_env=False))

        yield start


def connect(client: httpx2.Client, **options: int) -> socket.socket:
    address = urlsplit(str(client.base_url))
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.connect((address.hostname, address.port))
    connection.settimeout(30)
    return connection


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    found = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            found += piece
    return found


def error(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def well(client: httpx2.Client) -> bool:
    return client.post("/v1/completions", json=json.loads(BODY)).status_code == 200


@pytest.mark.parametrize(
    "sent", [b"", b"P", HEAD[:40], HEAD, HEAD + BODY[:-1], (HEAD + BODY) * 2 + HEAD[:9], b"POST / HTTP/1.1\r\nX: "]
)
def test_a_request_that_does_not_come_to_an_end(start: Callable[..., httpx2.Client], sent: bytes) -> None:
    client = start()
    with closing(connect(client)) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        answer = rest(connection)
        assert time.monotonic() - started < 20
    if sent:
        assert error(b"HTTP/1.1" + answer.rpartition(b"HTTP/1.1")[2]) == (
            408,
            "the request must arrive within 0.6 seconds",
        )
        assert answer.count(b"200 OK") == sent.count(BODY)
    else:
        assert answer == b""
    assert well(client)


def test_a_request_that_drips(start: Callable[..., httpx2.Client]) -> None:
    client, sent = start(), 0
    with closing(connect(client)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        started = time.monotonic()
        with suppress(OSError):  # broken pipe or reset
            while time.monotonic() - started < 20:
                connection.sendall(b" ")
                sent += 1
                time.sleep(0.05)
    assert 1 < sent < 100
    assert well(client)


def test_a_quick_client_may_stay(start: Callable[..., httpx2.Client]) -> None:
    """The time is that of each request, not of the connection, and a long answer is none of the client's fault."""
    client = start()
    with closing(connect(client)) as connection:
        for _ in range(5):
            connection.sendall(HEAD)
            time.sleep(PATIENCE / 3)
            connection.sendall(BODY)
            answer = b""
            while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")


def test_an_answer_may_take_longer_than_a_request(
    start: Callable[..., httpx2.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, choose = start(patience=0.2), scheduler.next_tokens
    monkeypatch.setattr(scheduler, "next_tokens", lambda *given: (time.sleep(0.2), choose(*given))[1])
    body = {"model": "demo", "prompt": [5], "max_tokens": 6, "temperature": 0}
    assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 6
    streamed = client.post("/v1/completions", json={**body, "stream": True})
    assert streamed.text.endswith("[DONE]\n\n")


def test_a_reader_that_takes_nothing(start: Callable[..., httpx2.Client], demo: GenerativeAdapter) -> None:
    """Its answers fill the buffers; then the server lets go of it."""
    client = start()
    name = client.post("/v1/contexts", json={"text": "The pet"}).json()["id"]
    size = len(client.get(f"/v1/contexts/{name}/export?format=adapter").content)
    request = f"GET /v1/contexts/{name}/export?format=adapter HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    count = 20_000_000 // size + 1
    with closing(connect(client, SO_RCVBUF=4096)) as connection:
        connection.sendall(request * count)
        time.sleep(3 * PATIENCE)
        assert well(client)
        assert len(rest(connection)) < size * count
    assert well(client)


def test_a_reader_that_is_slow_but_reads_gets_everything(start: Callable[..., httpx2.Client]) -> None:
    client = start(patience=0.3)
    name = client.post("/v1/contexts", json={"text": "The pet"}).json()["id"]
    whole = client.get(f"/v1/contexts/{name}/export?format=adapter").content
    with closing(connect(client, SO_RCVBUF=4096)) as connection:
        connection.sendall(f"GET /v1/contexts/{name}/export?format=adapter HTTP/1.0\r\n\r\n".encode())
        found, started = b"", time.monotonic()
        while time.monotonic() - started < 1.2 and (piece := connection.recv(2048)):
            found += piece
            time.sleep(0.005)
        found += rest(connection)
    assert len(found.partition(b"\r\n\r\n")[2]) == len(whole)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 200_000 + b"\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
        b"nonsense\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no host
        b"POST /v1/contexts HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/contexts HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/contexts HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_request_or_too_large(start: Callable[..., httpx2.Client], sent: bytes) -> None:
    client = start(patience=5)
    with closing(connect(client)) as connection:
        with suppress(OSError):  # the server may close it in the middle
            connection.sendall(sent)
        answer = rest(connection)
        assert not answer or error(answer)[0] == 400, answer
    assert well(client)


def test_a_thousand_idle_connections(start: Callable[..., httpx2.Client]) -> None:
    allow_files(4096)
    client = start(patience=3)
    with ExitStack() as stack:
        idle = [stack.enter_context(closing(connect(client))) for _ in range(1000)]
        assert well(client)
        for connection in idle[:500]:
            connection.sendall(HEAD[:30])
        assert well(client)
        assert all(rest(connection)[:12] in (b"", b"HTTP/1.1 408") for connection in idle)
    assert well(client)


def test_connections_are_bounded(start: Callable[..., httpx2.Client]) -> None:
    """8 beyond which requests are refused for now, 16 beyond which connections are closed."""
    client = start(patience=2, limits=Limits(waiting=4))
    with ExitStack() as stack:
        several = [stack.enter_context(closing(connect(client))) for _ in range(9)]
        time.sleep(0.3)  # for the server to take notice of them
        several[0].sendall(HEAD + BODY)
        assert rest(several[0]).startswith(b"HTTP/1.1 503")
        more = [stack.enter_context(closing(connect(client))) for _ in range(20)]
        several += more
        started = time.monotonic()
        assert rest(several[-1]) == b""
        assert time.monotonic() - started < 1
        for connection in several:
            rest(connection)
    assert well(client)
