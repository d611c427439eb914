"""A client that hangs up ends the work on its request, whatever kind it is and however far it has come."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import torch
from loopback import served

from gakernels import GenerativeAdapter
from gakernels.generation import scheduler
from gakernels.server.settings import Limits

ASKED = 1000  # tokens
KINDS = {
    "completion": ("/v1/completions", {"prompt": [5], "max_tokens": ASKED}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "What"}], "max_tokens": ASKED}),
}


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All tokens that are generated in this process; none of them ends a text, and a step takes a while."""
    found: list[int] = []

    def counted(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        time.sleep(0.002)
        found.extend([7] * len(logits))
        return torch.full((len(logits),), 7)

    monkeypatch.setattr(scheduler, "next_tokens", counted)
    return found


@pytest.fixture
def start(demo: GenerativeAdapter, tmp_path: Path) -> Iterator[Callable[..., httpx2.Client]]:
    with ExitStack() as stack:

        def start(**limits: int) -> httpx2.Client:
            url = stack.enter_context(served(demo, tmp_path / "data", limits=Limits(**limits)))
            return stack.enter_context(httpx2.Client(base_url=url, timeout=60, trust_env=False))

        yield start


def send(client: httpx2.Client, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request and read nothing."""
    address = urlsplit(str(client.base_url))
    text = json.dumps({"model": "demo", **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    connection = socket.create_connection((address.hostname, address.port))
    connection.sendall(head.encode() + text)
    return connection


def metric(client: httpx2.Client, name: str) -> float:
    lines = [line.split() for line in client.get("/metrics").text.splitlines()]
    return next((float(line[-1]) for line in lines if line[0] == name), 0)


def wait_until(met: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not met():
        assert time.monotonic() < end
        time.sleep(0.002)


def idle(client: httpx2.Client) -> bool:
    return metric(client, "gakernels_rows_running") == metric(client, "gakernels_waiting") == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_running_generation_stops(
    start: Callable[..., httpx2.Client], tokens: list[int], kind: str, stream: bool
) -> None:
    client = start()
    path, body = KINDS[kind]
    with closing(send(client, path, {**body, "stream": stream})):
        wait_until(lambda: len(tokens) >= 10)
    at_hang_up = len(tokens)
    wait_until(lambda: idle(client))
    assert len(tokens) - at_hang_up < ASKED / 4
    assert 0 <= len(tokens) - metric(client, "gakernels_new_tokens_total") <= 1  # one was under way
    after = client.post("/v1/completions", json={"model": "demo", "prompt": [5], "max_tokens": 2, "temperature": 0})
    assert after.json()["usage"]["completion_tokens"] == 2


def test_all_prompts_of_a_request_stop(start: Callable[..., httpx2.Client], tokens: list[int]) -> None:
    client = start(rows=3)
    with closing(send(client, "/v1/completions", {"prompt": [[5]] * 8, "max_tokens": ASKED})):
        wait_until(lambda: len(tokens) >= 10)
    wait_until(lambda: idle(client))
    assert len(tokens) < ASKED


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_waits_leaves_the_queue_at_once(
    start: Callable[..., httpx2.Client], tokens: list[int], stream: bool
) -> None:
    """Two may be let in, and one decoded: while the second waits there is no room, and there is when it hangs up."""
    client = start(rows=1, waiting=2)
    body = {"prompt": [5], "max_tokens": ASKED}
    short = {"model": "demo", "prompt": [5], "max_tokens": 1}
    with closing(send(client, "/v1/completions", body)):
        wait_until(lambda: len(tokens) > 0)
        with closing(send(client, "/v1/completions", {**body, "stream": stream})):
            wait_until(lambda: metric(client, "gakernels_waiting") == 1)
            assert client.post("/v1/completions", json=short).status_code == 503
        wait_until(lambda: metric(client, "gakernels_waiting") == 0)
        assert metric(client, "gakernels_rows_running") == 1  # the first one still has its row
        assert len(tokens) < ASKED
    assert client.post("/v1/completions", json=short).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_prompt_is_being_read_stops(
    start: Callable[..., httpx2.Client], tokens: list[int], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The client hangs up while the first forward pass runs."""
    client = start()
    reading, seen = scheduler.DecodingBatch.exchange, []

    def slowly(*arguments: Any) -> Any:
        seen.append(1)
        wait_until(lambda: len(seen) > 1)
        return reading(*arguments)

    body = {"prompt": [5] * 20, "max_tokens": ASKED, "stream": stream}
    monkeypatch.setattr(scheduler.DecodingBatch, "exchange", slowly)
    with closing(send(client, "/v1/completions", body)):
        wait_until(lambda: bool(seen))
    monkeypatch.setattr(scheduler.DecodingBatch, "exchange", reading)
    time.sleep(0.1)
    seen.append(1)
    wait_until(lambda: idle(client))
    assert len(tokens) < ASKED / 4


def test_hanging_up_before_the_first_event_of_a_stream_leaves_nothing_running(
    start: Callable[..., httpx2.Client], tokens: list[int]
) -> None:
    client = start(rows=2)
    path, body = KINDS["chat"]
    for _ in range(20):
        send(client, path, {**body, "stream": True}).close()
    wait_until(lambda: metric(client, 'gakernels_request_seconds_count{route="/v1/chat/completions"}') == 20)
    wait_until(lambda: idle(client))
    assert len(tokens) < 20 * ASKED / 4
