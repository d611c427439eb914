"""A server in use for half an hour by everybody at once, well-behaved or not: no error of its own, and flat memory.

GAKERNELS_SOAK_SECONDS says for how long.
"""

import json
import os
import re
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import httpx2
import pytest
import torch
from loopback import ServerProcess

from gakernels.data.people import draw_document

SECONDS = float(os.environ.get("GAKERNELS_SOAK_SECONDS", "1800"))
USERS, KEPT = 6, 5  # at a time; contexts of each
ALLOWED_GROWTH = 12 * 2**20  # bytes, from the second quarter of the time to the last
LIMITS = ("--cache-cpu", "2", "--cache-disk", "8", "--max-body-bytes", "50000", "--max-append-tokens", "2000")


class User(threading.Thread):
    """Does whatever comes to mind until the time is up, with contexts of its own and one that never changes."""

    def __init__(self, server: ServerProcess, seed: int, end: float) -> None:
        super().__init__()
        self.client, self.random, self.end = server.client(), Random(seed), end
        self.address = urlsplit(server.url)
        self.contexts: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.document = draw_document(self.random, 1, (15, 18), "test")
        self.question = self.document.questions()[0][0]
        self.fixed = str(self.send("POST", "/v1/contexts", {"text": self.document.text()}, 201).json()["id"])
        self.answer = self.ask(self.fixed)

    def send(self, method: str, path: str, body: object = None, *expected: int) -> httpx2.Response:
        response = self.client.request(method, path, json=body)
        self.statuses[response.status_code] += 1
        if response.status_code not in (expected or (200,)):
            self.wrong.append(f"{method} {path} {str(body)[:80]}: {response.status_code} {response.text[:200]}")
        return response

    def ask(self, name: str) -> str:
        body = {"model": name, "prompt": self.question, "max_tokens": 6, "temperature": 0}
        return str(self.send("POST", "/v1/completions", body).json()["choices"][0]["text"])

    def run(self) -> None:
        actions: list[Callable[[], object]] = [
            self.create, self.append, self.append, self.complete, self.complete, self.chat, self.stream, self.export,
            self.look, self.be_wrong, self.hang_up, self.dawdle, self.check,
        ]  # fmt: skip
        try:
            while time.monotonic() < self.end and len(self.wrong) < 10:
                self.random.choice(actions)()
        except Exception as error:
            self.wrong.append(repr(error))

    def text(self) -> str:
        return draw_document(self.random, 1, (3, 18), "test").text()

    def any(self) -> str:
        return self.random.choice([*self.contexts, self.fixed])

    def create(self) -> None:
        body = {"label": "soak", "text": self.text() if self.random.random() < 0.7 else None}
        self.contexts.append(self.send("POST", "/v1/contexts", body, 201).json()["id"])
        while len(self.contexts) > KEPT:
            self.send("DELETE", f"/v1/contexts/{self.contexts.pop(0)}")

    def append(self) -> None:
        if self.contexts:
            name = self.random.choice(self.contexts)
            self.send("POST", f"/v1/contexts/{name}/append", {"text": self.text()})

    def complete(self) -> None:
        prompts = [self.question] * self.random.randint(1, 4)
        values = {"max_tokens": self.random.randint(1, 40), "temperature": self.random.choice([0, 1, 3]), "stop": ["."]}
        self.send("POST", "/v1/completions", {"model": self.any(), "prompt": prompts, **values})

    def chat(self) -> None:
        turns = [{"role": "user", "content": "Who?"}] * self.random.randint(1, 3)
        self.send("POST", "/v1/chat/completions", {"model": self.any(), "messages": turns, "max_tokens": 20})

    def stream(self) -> None:
        body = {"model": self.any(), "prompt": self.question, "max_tokens": 60, "temperature": 2, "stream": True}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            for number, _ in enumerate(response.iter_lines()):
                if number > 20 and self.random.random() < 0.1:
                    break

    def export(self) -> None:
        form = self.random.choice(["peft", "adapter", "compact"])
        self.send("GET", f"/v1/contexts/{self.any()}/export?format={form}", None, 200, 409)  # 409: it is empty

    def look(self) -> None:
        for path in ("/v1/contexts", "/v1/models", f"/v1/contexts/{self.any()}", "/health", "/metrics"):
            self.send("GET", path)

    def be_wrong(self) -> None:
        name = "ctx-" + "0" * 32
        wrong: list[tuple[str, str, object, int]] = [
            ("POST", "/v1/completions", {"model": "gakernels-demo", "prompt": 5}, 400),
            ("POST", "/v1/completions", {"model": name, "prompt": "The"}, 404),
            ("POST", "/v1/contexts", {"text": "x" * 60_000}, 413),
            ("POST", "/v1/contexts", {"text": "The pet " * 1500}, 400),
            ("POST", f"/v1/contexts/{self.fixed}/append", {"text": "The", "revision": 9}, 409),
            ("GET", f"/nowhere/{self.random.random()}", None, 404),
            ("DELETE", f"/v1/contexts/{name}", None, 404),
        ]
        method, path, body, status = self.random.choice(wrong)
        self.send(method, path, body, status)

    def connect(self) -> socket.socket:
        assert self.address.hostname is not None
        return socket.create_connection((self.address.hostname, self.address.port or 0))

    def hang_up(self) -> None:
        body = {"model": self.any(), "prompt": "The", "max_tokens": 900, "stream": self.random.random() < 0.5}
        content = json.dumps(body).encode()
        with self.connect() as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content))
            connection.sendall(content)
            time.sleep(self.random.random() / 10)

    def dawdle(self) -> None:
        with suppress(OSError), self.connect() as connection:
            connection.sendall(self.random.choice([b"", b"GET / HT", b"nonsense\r\n\r\n", b"GET /" + b"a" * 300_000]))
            time.sleep(self.random.random() / 5)

    def check(self) -> None:
        """No answer of another context, nor of another state."""
        found = self.ask(self.fixed)
        if found != self.answer:
            self.wrong.append(f"{found!r} was {self.answer!r}")


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.slow
def test_it_stays_as_it_is_however_long_it_is_used(tmp_path: Path, generator: torch.Generator) -> None:
    server = ServerProcess(tmp_path / "data", *LIMITS)
    try:
        before = files(server.pid)
        start = time.monotonic()
        users = [User(server, generator.initial_seed() + number, start + SECONDS) for number in range(USERS)]
        for user in users:
            user.start()
        memory = []
        while any(user.is_alive() for user in users):
            memory.append(resident(server.pid))
            time.sleep(SECONDS / 400)
        for user in users:
            user.join()
            user.client.close()
        assert [line for user in users for line in user.wrong] == []
        with server.client() as client:
            end = time.monotonic() + 30
            while "gakernels_rows_running 0" not in (page := client.get("/metrics").text):
                assert time.monotonic() < end
        assert re.findall(r'gakernels_requests_total\{.*status="5.*', page) == []
        statuses = sum((user.statuses for user in users), Counter())
        assert sum(statuses.values()) > 5 * SECONDS
        quarter = len(memory) // 4
        second, last = (statistics.median(memory[place : place + quarter]) for place in (quarter, 3 * quarter))
        print(f"{sum(statuses.values())} requests; {second / 2**20:.1f} MiB, then {last / 2**20:.1f} MiB")
        assert last - second < ALLOWED_GROWTH, [number // 2**20 for number in memory[::10]]
        assert files(server.pid) <= before + 8
    finally:
        server.kill()
    assert "Traceback" not in server.read_log()
