"""Many requests at a time over real connections: no error, and each answer is that of its own context."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from demo_users import User
from loopback import served

from benchmarks.serving import Load, Question, answers, run_load
from gakernels import GenerativeAdapter


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
