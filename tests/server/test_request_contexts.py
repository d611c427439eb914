"""Contexts that requests bring with them: formed once, found again, and nobody else's."""

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asking import GREEDY, complete, events, refused
from demo_users import User
from starlette.testclient import TestClient

from gakernels import GenerativeAdapter
from gakernels.generation import Sampling, generate
from gakernels.server.context_store import ContextStore, text_identifier
from gakernels.server.settings import ApiKeys, Limits

KEYS = ["first-key-of-16-characters", "second-key-of-16-characters"]


@pytest.fixture
def passes(demo: GenerativeAdapter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens of the contexts that the model reads."""
    read, given = [], demo.passes

    def counted(contexts: list[list[int]], *others: Any) -> Iterator[Any]:
        read.append(len(contexts[0]))
        return given(contexts, *others)

    monkeypatch.setattr(demo, "passes", counted)
    return read


@pytest.fixture
def user(make_users: Callable[[int], list[User]]) -> User:
    return make_users(1)[0]


def expected(demo: GenerativeAdapter, user: User) -> str:
    return generate(demo, [user.question], [user.adapter], Sampling(6))[0].text


def turns(user: User) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": user.question.removeprefix("Question: ").removesuffix(" Answer:")},
    ]


def test_a_text_is_read_once(
    client: TestClient, demo: GenerativeAdapter, user: User, passes: list[int], make_users: Callable[[int], list[User]]
) -> None:
    text = user.document.text()
    passes.clear()
    first = complete(client, "demo", user.question, context=text)
    assert first["choices"][0]["text"] == expected(demo, user)
    assert first["model"] == "demo"
    tokens = user.adapter.tokens_seen
    assert (first["usage"]["context_tokens"], first["usage"]["context_cached"]) == (tokens, False)
    assert first["usage"]["prompt_tokens"] == len(demo.tokenizer(user.question)["input_ids"])
    assert sum(passes) == tokens
    for context in (text, [text]):
        again = complete(client, "demo", user.question, context=context)
        assert again["choices"] == first["choices"]
        assert again["usage"] == {**first["usage"], "context_cached": True}
    message = {"role": "system", "name": "context", "content": [{"type": "text", "text": text}]}
    body = {"model": "demo", "messages": [message, *turns(user)], **GREEDY, "stop": "."}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == f" {user.answer}"
    assert answer["usage"]["context_cached"] is True
    assert sum(passes) == tokens  # all of them found it
    metrics = client.get("/metrics").text
    assert f"gakernels_context_tokens_total {tokens:.1f}" in metrics
    other = make_users(1)[0]
    assert complete(client, "demo", other.question, context=other.document.text())["usage"]["context_cached"] is False
    plain = complete(client, "demo", user.question)
    assert plain["choices"] != first["choices"]
    assert "context_tokens" not in plain["usage"]


def test_a_message_that_is_a_context_is_no_part_of_the_conversation(client: TestClient, user: User) -> None:
    context = {"name": "context", "content": user.document.text()}
    plain = client.post("/v1/chat/completions", json={"model": "demo", "messages": turns(user), **GREEDY}).json()
    for role in ("system", "developer"):
        body = {"model": "demo", "messages": [{"role": role, **context}, *turns(user)], **GREEDY}
        answer = client.post("/v1/chat/completions", json=body).json()
        assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
        assert answer["choices"] != plain["choices"]
    body["messages"] = [{"role": "user", **context}, *turns(user)]  # a user of that name is a speaker
    told = client.post("/v1/chat/completions", json=body).json()
    assert "context_tokens" not in told["usage"]
    assert told["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    refused(
        client.post("/v1/chat/completions", json={**body, "messages": [{"role": "system", **context}]}), 400, "not a"
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_tells_it_too(client: TestClient, user: User, path: str) -> None:
    asked = {"prompt": user.question} if path == "/v1/completions" else {"messages": turns(user)}
    body = {"model": "demo", **asked, **GREEDY, "context": user.document.text(), "stream": True}
    for cached in (False, True):
        pieces = events(client.post(path, json={**body, "stream_options": {"include_usage": True}}).text)
        usage = pieces[-1]["usage"]
        assert (usage["context_tokens"], usage["context_cached"]) == (user.adapter.tokens_seen, cached)


def test_several_texts_are_one_context(client: TestClient, demo: GenerativeAdapter, user: User) -> None:
    text = user.document.text()
    half = text.index(". ", len(text) // 2) + 2
    parts = [text[:half], text[half:]]
    stream = demo.stream().append(parts[0]).append(parts[1])
    right = generate(demo, [user.question], [stream.compact()], Sampling(6))[0].text
    answer = complete(client, "demo", user.question, context=parts)
    assert answer["choices"][0]["text"] == right
    assert answer["usage"]["context_tokens"] == stream.tokens_seen
    message = {"role": "system", "name": "context", "content": parts[1]}
    body = {"model": "demo", "messages": [*turns(user), message], "context": parts[0], **GREEDY}
    assert client.post("/v1/chat/completions", json=body).json()["usage"]["context_cached"] is True
    for other in (parts[::-1], [text], [parts[0]]):
        assert complete(client, "demo", user.question, context=other)["usage"]["context_cached"] is False


def test_each_key_has_its_own(make_client: Callable[..., TestClient], user: User) -> None:
    client = make_client(keys=ApiKeys(KEYS))
    body = {"model": "demo", "prompt": user.question, "context": user.document.text(), **GREEDY}
    found = []
    for key in (*KEYS, *KEYS):
        answer = client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}).json()
        found.append(answer["usage"]["context_cached"])
    assert found == [False, False, True, True]
    ids = []
    for key in KEYS:
        listed = client.get("/v1/contexts", headers={"Authorization": f"Bearer {key}"}).json()["data"]
        ids += [context["id"] for context in listed]
    assert len(set(ids)) == 2
    other = {"Authorization": f"Bearer {KEYS[1]}"}
    refused(client.get(f"/v1/contexts/{ids[0]}", headers=other), 404)
    refused(client.post("/v1/completions", json={**body, "context": None, "model": ids[0]}, headers=other), 404)


def test_it_is_found_after_a_restart_and_read_again_once_it_is_deleted(
    make_client: Callable[..., TestClient], user: User
) -> None:
    text, client = user.document.text(), make_client()
    first = complete(client, "demo", user.question, context=text)
    client = make_client()
    again = complete(client, "demo", user.question, context=text)
    assert (again["choices"], again["usage"]["context_cached"]) == (first["choices"], True)
    listed = client.get("/v1/contexts").json()["data"]
    assert [context["tokens_seen"] for context in listed] == [user.adapter.tokens_seen]
    name = listed[0]["id"]
    assert name == text_identifier("", [text])
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo"]
    assert complete(client, name, user.question)["choices"] == first["choices"]
    refused(client.post(f"/v1/contexts/{name}/append", json={"text": "The pet"}), 409, "nothing can be appended")
    assert client.get(f"/v1/contexts/{name}/export").status_code == 200
    assert client.delete(f"/v1/contexts/{name}").status_code == 200
    assert complete(client, "demo", user.question, context=text)["usage"]["context_cached"] is False


def test_reading_that_was_interrupted_is_continued(
    client: TestClient, demo: GenerativeAdapter, user: User, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = user.document.text()
    half = text.index(". ", len(text) // 2) + 2
    body = {"model": "demo", "prompt": user.question, "context": [text[:half], text[half:]], **GREEDY}
    commit = ContextStore.commit

    def failing(store: ContextStore, context: Any, *others: Any) -> Any:
        if context.revision == 1:
            raise OSError("no space")
        return commit(store, context, *others)

    with monkeypatch.context() as patch:
        patch.setattr(ContextStore, "commit", failing)
        refused(client.post("/v1/completions", json=body), 503)
    passes.clear()
    answer = client.post("/v1/completions", json=body).json()
    assert answer["usage"]["context_cached"] is False
    assert len(passes) == 1  # the second half alone
    stream = demo.stream().append(text[:half]).append(text[half:])
    right = generate(demo, [user.question], [stream.compact()], Sampling(6))[0].text
    assert answer["choices"][0]["text"] == right


def test_what_can_not_be_read_leaves_no_context(make_client: Callable[..., TestClient], user: User) -> None:
    limits = Limits(append_tokens=50, context_tokens=60)
    client = make_client(limits=limits)
    body = {"model": "demo", "prompt": user.question, **GREEDY}
    words = " ".join(["pet"] * 40)
    for context, word in (
        ("", "at least one token"),
        ([], "context"),
        (["The pet", ""], "at least one token"),
        (5, "context"),
        (user.document.text(), "50 tokens"),
        ([words, words], "60 tokens"),
        (["a"] * 257, "256"),
    ):
        refused(client.post("/v1/completions", json={**body, "context": context}), 400, word)
    assert client.get("/v1/contexts").json()["data"] == []
    name = client.post("/v1/contexts", json={}).json()["id"]
    refused(client.post("/v1/completions", json={**body, "model": name, "context": "The pet"}), 400, "base model")
    refused(client.post("/v1/completions", json={**body, "model": "nobody", "context": "The pet"}), 404, "nobody")


def names(client: TestClient) -> set[str]:
    return {context["id"] for context in client.get("/v1/contexts").json()["data"]}


def test_the_least_recently_used_makes_room_and_none_that_was_made_by_hand(
    make_client: Callable[..., TestClient], make_users: Callable[[int], list[User]]
) -> None:
    client = make_client(limits=Limits(contexts_per_key=3))
    by_hand = client.post("/v1/contexts", json={"text": "The pet of the town."}).json()["id"]
    texts = [user.document.text() for user in make_users(3)]

    def cached(number: int) -> bool:
        return bool(complete(client, "demo", "The", context=texts[number])["usage"]["context_cached"])

    assert [cached(0), cached(1), cached(0), cached(2)] == [False, False, True, False]
    ids = [text_identifier("", [text]) for text in texts]
    assert names(client) == {by_hand, ids[0], ids[2]}
    assert client.post("/v1/contexts", json={}).status_code == 201  # they make room for others too
    assert names(client) > {by_hand, ids[2]}
    assert client.post("/v1/contexts", json={}).status_code == 201
    refused(client.post("/v1/contexts", json={}), 409, "delete one")
    body = {"model": "demo", "prompt": "The", "context": texts[0], **GREEDY}
    refused(client.post("/v1/completions", json=body), 409, "delete one")
    assert by_hand in names(client)


def test_requests_at_the_same_time_read_it_once_and_lose_nothing(
    make_client: Callable[..., TestClient], make_users: Callable[[int], list[User]], passes: list[int], demo: Any
) -> None:
    """With room for two contexts only, and more texts than that."""
    client = make_client(limits=Limits(contexts_per_key=2))
    users = make_users(2)
    passes.clear()

    def ask(number: int) -> Any:
        user = users[number % 2]
        return client.post(
            "/v1/completions",
            json={"model": "demo", "prompt": user.question, "context": user.document.text(), **GREEDY},
        ).json()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(16)))
    for number, answer in enumerate(answers):
        assert answer["choices"][0]["text"] == expected(demo, users[number % 2])
    assert sum(passes) == sum(user.adapter.tokens_seen for user in users)
    assert [answer["usage"]["context_cached"] for answer in answers].count(False) == 2


def test_a_context_in_use_does_not_make_room(
    make_client: Callable[..., TestClient], demo: GenerativeAdapter, make_users: Callable[[int], list[User]]
) -> None:
    client = make_client(limits=Limits(contexts_per_key=1))
    first, second = make_users(2)

    async def hang_in_between() -> list[Any]:
        """A stream that nobody has read yet holds its context."""
        found: list[Any] = []
        reading, done = asyncio.Event(), asyncio.Event()
        content = json.dumps(
            {"model": "demo", "prompt": "The", "context": first.document.text(), "stream": True, **GREEDY}
        ).encode()
        sent = iter([{"type": "http.request", "body": content}])

        async def receive() -> dict[str, Any]:
            for message in sent:
                return message
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body" and not reading.is_set():
                reading.set()
                await done.wait()

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        stream = asyncio.create_task(client.app(scope, receive, send))
        await asyncio.wait_for(reading.wait(), 30)
        body = {"model": "demo", "prompt": "The", "context": second.document.text(), **GREEDY}
        found.append(await asyncio.to_thread(client.post, "/v1/completions", json=body))
        done.set()
        await asyncio.wait_for(stream, 30)
        found.append(await asyncio.to_thread(client.post, "/v1/completions", json=body))
        return found

    refusal, answer = client.portal.call(hang_in_between)
    refused(refusal, 409, "delete one")
    assert answer.status_code == 200
    assert names(client) == {text_identifier("", [second.document.text()])}


def test_identifiers_tell_texts_and_owners_apart() -> None:
    cases = [("", ["ab"]), ("", ["a", "b"]), ("", ["b", "a"]), ("a", ["b"]), ("ab", [""]), ("", ['a", "b'])]
    assert len({text_identifier(*case) for case in cases}) == len(cases)
    assert text_identifier("x", ["ä"]) == text_identifier("x", ["ä"])
