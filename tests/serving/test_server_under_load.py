"""Many requests at a time over real connections: no error, and each answer is that of its own context."""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from demo_users import User

from benchmarks.serving import Load, Question, answers, run_load
from gakernels import GenerativeAdapter
from gakernels.serving.server import Settings, serve


@contextmanager
def served(demo: GenerativeAdapter, folder: Path) -> Iterator[str]:
    """The address of a server that runs in a thread of this process."""
    settings = Settings(folder, "demo", cpu_mebibytes=1, disk_mebibytes=64, threads=1)
    addresses: queue.Queue[str] = queue.Queue()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    server = serve(demo, settings, "127.0.0.1", 0, addresses.put, stop)
    thread = threading.Thread(target=loop.run_until_complete, args=[server])
    thread.start()
    try:
        yield addresses.get(timeout=60)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()


def check(demo: GenerativeAdapter, users: list[User], requests: int, at_once: int, folder: Path) -> Load:
    questions = [Question(user.document.text(), user.question) for user in users]
    expected = answers(demo, [user.adapter for user in users], questions)
    with served(demo, folder) as url:
        load = asyncio.run(run_load(url, questions, requests, at_once))
        health = httpx2.get(f"{url}/health", trust_env=False).json()
    assert load.errors == []
    assert health["contexts"] == len(users)
    assert len(load.answers) == requests
    for user, text in load.answers:
        assert text == expected[user]
    assert len({text for _, text in load.answers}) > len(users) / 2  # they are different answers
    return load


def test_no_error_and_no_cross_talk(
    demo: GenerativeAdapter, make_users: Callable[[int], list[User]], tmp_path: Path
) -> None:
    check(demo, make_users(12), requests=40, at_once=16, folder=tmp_path / "data")


@pytest.mark.slow
def test_no_error_and_no_cross_talk_at_full_size(
    demo: GenerativeAdapter, make_users: Callable[[int], list[User]], tmp_path: Path
) -> None:
    check(demo, make_users(50), requests=200, at_once=32, folder=tmp_path / "data")


def test_appends_while_others_are_answered(
    demo: GenerativeAdapter, make_users: Callable[[int], list[User]], tmp_path: Path
) -> None:
    """Answers of contexts that do not change stay the same while others grow, and those go on."""
    users = make_users(4)
    questions = [Question(user.document.text(), user.question) for user in users]
    expected = answers(demo, [user.adapter for user in users], questions)

    async def mixed(url: str) -> tuple[Load, int]:
        async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            growing = (await client.post("/v1/contexts", json={})).json()["id"]

            async def grow() -> int:
                for user in users * 2:
                    response = await client.post(f"/v1/contexts/{growing}/append", json={"text": user.document.text()})
                    assert response.status_code == 200
                    ask = {"model": growing, "prompt": user.question, "max_tokens": 3}
                    assert (await client.post("/v1/completions", json=ask)).status_code == 200
                return int(response.json()["revision"])

            load, revision = await asyncio.gather(run_load(url, questions, 24, 8), grow())
            return load, revision

    with served(demo, tmp_path / "data") as url:
        load, revision = asyncio.run(mixed(url))
    assert revision == 8
    assert load.errors == []
    assert all(text == expected[user] for user, text in load.answers)


def test_a_client_that_goes_away_frees_its_row(demo: GenerativeAdapter, tmp_path: Path) -> None:
    body = {"model": "demo", "prompt": [5], "max_tokens": 1000, "stream": True, "temperature": 2}
    with served(demo, tmp_path / "data") as url, httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        for _ in range(500):
            page = client.get("/metrics").text
            if "gakernels_rows_running 0" in page:
                break
        generated = next(line for line in page.splitlines() if line.startswith("gakernels_new_tokens_total"))
        assert "gakernels_rows_running 0" in page
        assert float(generated.split()[1]) < 1000
