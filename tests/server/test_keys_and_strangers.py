"""What somebody with another key, or with none, gets to know: nothing. And keys are written nowhere."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
import pytest
from demo_users import User
from loopback import ServerProcess
from starlette.testclient import TestClient

import gakernels
from gakernels import GenerativeAdapter
from gakernels.server.server import assemble, create_app
from gakernels.server.settings import ApiKeys, Limits, Settings

MINE, THEIRS = "first-key-of-16-characters", "second-key-of-16-characters"
NOBODYS = "ctx-" + "0123456789abcdef" * 2
HERE = str(Path(gakernels.__file__).parent)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def requests(name: str) -> list[dict[str, Any]]:
    """One of every kind that names a context."""
    path = f"/v1/contexts/{name}"
    turns = [{"role": "user", "content": "Who?"}]
    return [
        {"method": "GET", "url": path},
        {"method": "GET", "url": f"{path}/export"},
        {"method": "GET", "url": f"{path}/export?format=compact"},
        {"method": "GET", "url": f"{path}/export?format=gguf"},
        {"method": "GET", "url": f"/v1/models/{name}"},
        {"method": "POST", "url": path, "json": {"label": "mine"}},
        {"method": "POST", "url": "/v1/contexts/compose", "json": {"contexts": [name]}},
        {"method": "POST", "url": f"{path}/append", "json": {"text": "The pet"}},
        {"method": "POST", "url": f"{path}/append", "json": {"text": "The pet", "revision": 0}},
        {"method": "POST", "url": f"{path}/append", "json": {"tokens": [10**6]}},
        {"method": "POST", "url": "/v1/completions", "json": {"model": name, "prompt": "The"}},
        {"method": "POST", "url": "/v1/completions", "json": {"model": name, "prompt": [10**6]}},
        {"method": "POST", "url": "/v1/completions", "json": {"model": name, "prompt": "The", "stream": True}},
        {"method": "POST", "url": "/v1/chat/completions", "json": {"model": name, "messages": turns}},
        {"method": "DELETE", "url": path},
    ]


def test_a_foreign_context_is_one_that_does_not_exist(make_client: Callable[..., TestClient]) -> None:
    """Status, headers and body are the same, in every state that the context can be in."""
    client = make_client(keys=ApiKeys([MINE, THEIRS]))
    names = [client.post("/v1/contexts", json={}, headers=bearer(THEIRS)).json()["id"]]
    names.append(client.post("/v1/contexts", json={"text": "The pet"}, headers=bearer(THEIRS)).json()["id"])
    for name in names:
        for foreign, absent in zip(requests(name), requests(NOBODYS), strict=True):
            one, other = (client.request(headers=bearer(MINE), **request) for request in (foreign, absent))
            assert one.status_code == other.status_code == 404, (foreign, one.text, other.text)
            assert one.text.replace(name, NOBODYS) == other.text
            assert one.headers == other.headers
    for path in ("/v1/contexts", "/v1/models"):
        assert not any(name in client.get(path, headers=bearer(MINE)).text for name in names)
        assert all(name in client.get(path, headers=bearer(THEIRS)).text for name in names)
    for path in ("/", "/docs", "/health", "/metrics", "/openapi.json"):
        assert not any(word in client.get(path).text for word in (*names, MINE, THEIRS))


def test_a_foreign_context_takes_the_same_steps_as_one_that_does_not_exist(
    demo: GenerativeAdapter, tmp_path: Path
) -> None:
    """So its time tells nothing: every function of the library that runs for one request runs for the other."""

    async def traced(client: httpx2.AsyncClient, request: dict[str, Any]) -> list[str]:
        calls: list[str] = []

        def note(frame: FrameType, event: str, _: Any) -> None:
            code = frame.f_code
            if event == "call" and code.co_filename.startswith(HERE):
                calls.append(f"{code.co_filename}:{code.co_firstlineno} {code.co_name}")

        sys.setprofile(note)
        try:
            response = await client.request(headers=bearer(MINE), **request)
        finally:
            sys.setprofile(None)
        assert response.status_code == 404
        return calls

    async def compare() -> None:
        settings = Settings(tmp_path / "data", "demo", keys=ApiKeys([MINE, THEIRS]), threads=1)
        parts = assemble(demo, settings)
        transport = httpx2.ASGITransport(app=create_app(parts))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            made = await client.post("/v1/contexts", json={"text": "The pet"}, headers=bearer(THEIRS))
            name = made.json()["id"]
            asked = {"model": name, "prompt": "The", "max_tokens": 1}
            assert (await client.post("/v1/completions", json=asked, headers=bearer(THEIRS))).status_code == 200
            for foreign, absent in zip(requests(name), requests(NOBODYS), strict=True):
                await traced(client, absent)  # what is done once, such as imports
                steps = await traced(client, foreign)
                assert steps == await traced(client, absent), foreign
                assert len(steps) > 5
        await parts.close()

    asyncio.run(compare())


def test_a_foreign_context_is_refused_at_once_while_it_is_busy(
    make_client: Callable[..., TestClient], demo: GenerativeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(keys=ApiKeys([MINE, THEIRS]))
    name = client.post("/v1/contexts", json={}, headers=bearer(THEIRS)).json()["id"]
    reading, go_on, passes = threading.Event(), threading.Event(), demo.passes

    def slowly(*arguments: Any) -> Any:
        reading.set()
        assert go_on.wait(30)
        return passes(*arguments)

    monkeypatch.setattr(demo, "passes", slowly)
    path, answers = f"/v1/contexts/{name}/append", []
    append = {"url": path, "json": {"text": "The pet"}, "headers": bearer(THEIRS)}
    owner = threading.Thread(target=lambda: answers.append(client.post(**append)))
    owner.start()
    try:
        assert reading.wait(30)
        started = time.monotonic()
        for request in requests(name):
            assert client.request(headers=bearer(MINE), **request).status_code == 404
        assert time.monotonic() - started < 10
    finally:
        go_on.set()
        owner.join()
    assert answers[0].status_code == 200


def test_without_a_key_nothing_of_a_body_is_read(make_client: Callable[..., TestClient]) -> None:
    """The answer is the same whatever comes, known path or not: nothing, malformed, too large, or right."""
    client = make_client(keys=ApiKeys([MINE]), limits=Limits(body_bytes=1000))

    seen = []
    for content in (b"", b"{", b"x" * 5000, json.dumps({"text": "The"}).encode()):
        for path in ("/v1/contexts", "/v1/completions", "/v1/nowhere", f"/v1/contexts/{NOBODYS}/append"):
            for headers in ({}, bearer("not-a-key-of-this-server"), {"Authorization": f"Basic {MINE}"}):
                response = client.post(path, content=content, headers=headers)
                seen.append((response.status_code, response.text))
    assert len(set(seen)) == 1
    assert seen[0][0] == 401
    assert client.post("/v1/contexts", content=b"{", headers={"Authorization": f"bearer {MINE}"}).status_code == 400


def test_keys_are_written_nowhere(tmp_path: Path, make_users: Callable[[int], list[User]]) -> None:
    """Not in the log, not in the folder, not in an answer: whatever is done with right, wrong and misplaced keys."""
    keys, wrong = tmp_path / "keys.txt", "a-wrong-key-of-somebody"
    keys.write_text(f"{MINE}\n{THEIRS}\n")
    server = ServerProcess(tmp_path / "data", "--api-keys", str(keys), "--max-contexts", "3")
    answers = []
    try:
        with closing(server.client()) as client:
            for key in (MINE, THEIRS, wrong):
                for request in [
                    {"method": "POST", "url": "/v1/contexts", "json": {"text": make_users(1)[0].document.text()}},
                    {"method": "POST", "url": "/v1/contexts", "content": b"{"},
                    {"method": "GET", "url": "/v1/contexts"},
                    *requests(NOBODYS),
                ]:
                    answers.append(client.request(headers=bearer(key), **request).text)
            # A failure inside the server writes a traceback.
            name = client.get("/v1/contexts", headers=bearer(MINE)).json()["data"][0]["id"]
            path = tmp_path / "data" / "contexts" / f"{name}.safetensors"
            (tmp_path / "damaged").write_bytes(path.read_bytes()[:-5])
            (tmp_path / "damaged").replace(path)
            failed = client.post(f"/v1/contexts/{name}/append", json={"text": "The"}, headers=bearer(MINE))
            answers += [failed.text, client.get("/metrics").text, client.get("/health").text]
        server.end()
    finally:
        server.kill()
    log = server.read_log()
    assert "damaged" in log  # the log is where such things are written
    written = [log, *answers, *(file.read_bytes().decode("latin-1") for file in (tmp_path / "data").rglob("*.*"))]
    assert len(written) > 40
    for key in (MINE, THEIRS, wrong):
        assert not any(key in text for text in written)
    assert MINE not in repr(Settings(tmp_path, "base", keys=ApiKeys([MINE]), vllm_key=MINE))
