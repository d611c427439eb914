"""Requests as clients send them: nulls, echoed turns, no Content-Type, pages in a browser."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from gakernels.server import protocol
from gakernels.server.settings import ApiKeys, Limits

GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 4}
PAGE = "https://app.example.org"


def told(response: Any, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert all(word in message for word in words), message


def optional(model: type[protocol.Request]) -> dict[str, None]:
    return {name: None for name, field in model.model_fields.items() if not field.is_required()}


@pytest.mark.parametrize(
    ("path", "model", "body"),
    [
        ("/v1/completions", protocol.CompletionRequest, {"prompt": "The pet"}),
        ("/v1/chat/completions", protocol.ChatRequest, {"messages": [{"role": "user", "content": "Who?"}]}),
    ],
)
def test_null_is_the_same_as_nothing(
    make_client: Callable[..., TestClient], path: str, model: type[protocol.Request], body: dict[str, Any]
) -> None:
    client = make_client(limits=Limits(new_tokens=16))
    strangers = ("tools", "response_format", "audio", "web_search_options", "max_new_tokens")
    nulls = optional(model)
    assert {"temperature", "top_p", "n", "stream", "max_tokens", "stop", "seed"} < set(nulls)
    nothing = client.post(path, json={**body, "model": "demo", "top_k": 1, "max_tokens": 16})
    null = client.post(
        path, json={**nulls, **dict.fromkeys(strangers), **body, "model": "demo", "top_k": 1, "max_tokens": 16}
    )
    assert null.status_code == nothing.status_code == 200, null.text
    assert null.json()["choices"] == nothing.json()["choices"]
    one_by_one = {**body, "model": "demo", "max_tokens": 1}
    for name in nulls:
        assert client.post(path, json={**one_by_one, name: None}).status_code == 200, name
    for name in strangers:
        told(client.post(path, json={**body, "model": "demo", name: {}}), 400, name)
    told(client.post(path, json={**body, "model": None}), 400, "model")


def test_null_in_the_other_bodies(client: TestClient) -> None:
    made = client.post("/v1/contexts", json={**optional(protocol.CreateContext), "metadata": None})
    assert (made.status_code, made.json()["label"]) == (201, "")
    append = f"/v1/contexts/{made.json()['id']}/append"
    assert client.post(append, json={**optional(protocol.AppendText), "text": "The"}).status_code == 200
    told(client.post(append, json=optional(protocol.AppendText)), 400, "text")
    options = {"stream": True, "stream_options": {"include_usage": None}, "prompt": "The"}
    assert client.post("/v1/completions", json={**GREEDY, **options}).status_code == 200


def test_the_schema_says_that_optional_fields_may_be_null(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest", "Message", "CreateContext", "AppendText", "StreamOptions"):
        for field, shape in schemas[name]["properties"].items():
            nullable = {"type": "null"} in shape.get("anyOf", ())
            assert nullable == (field not in schemas[name].get("required", ())), (name, field)


def test_a_developer_is_the_system(make_client: Callable[..., TestClient]) -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}The pet {% else %}of {% endif %}{% endfor %}"
    client = make_client(chat_template=template)

    def tokens(role: str) -> int:
        turns = [{"role": role, "content": "be short"}, {"role": "user", "content": "Who?"}]
        answer = client.post("/v1/chat/completions", json={**GREEDY, "messages": turns})
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    assert tokens("developer") == tokens("system") != tokens("user")
    turns = {"messages": [{"role": "tool", "content": "5"}]}
    told(client.post("/v1/chat/completions", json={**GREEDY, **turns}), 400, "role")


@pytest.mark.parametrize(
    "extra",
    [
        {"refusal": None},
        {"tool_calls": None, "function_call": None, "audio": None, "name": None, "reasoning_content": None},
        {"tool_calls": [], "annotations": []},
    ],
)
def test_an_answer_may_be_sent_back_as_openai_clients_hold_it(client: TestClient, extra: dict[str, Any]) -> None:
    question = {"role": "user", "content": "What is the pet?"}
    turn = client.post("/v1/chat/completions", json={**GREEDY, "messages": [question]}).json()["choices"][0]["message"]
    plain, echoed = (
        client.post("/v1/chat/completions", json={**GREEDY, "messages": [question, {**turn, **more}, question]})
        for more in ({}, extra)
    )
    assert echoed.status_code == 200, echoed.text
    assert echoed.json()["choices"] == plain.json()["choices"]
    calls = {**turn, "tool_calls": [{"id": "1"}]}  # what can't be done is still refused
    told(client.post("/v1/chat/completions", json={**GREEDY, "messages": [question, calls]}), 400, "tool_calls")


def test_a_turn_may_come_in_parts(make_client: Callable[..., TestClient]) -> None:
    client = make_client(chat_template="{% for m in messages %}{{ m.content | replace('\n', ' ') }}{% endfor %}")

    def answer(content: object) -> Any:
        return client.post("/v1/chat/completions", json={**GREEDY, "messages": [{"role": "user", "content": content}]})

    parts = [{"type": "text", "text": "The pet of"}, {"type": "text", "text": "the town", "cache_control": None}]
    whole, several = answer("The pet of the town").json(), answer(parts).json()
    assert (several["usage"], several["choices"]) == (whole["usage"], whole["choices"])
    image = {"type": "image_url", "image_url": {"url": "http://example.org"}}
    for wrong in ([*parts, image], [{"type": "text"}], [], None, [None]):
        told(answer(wrong), 400, "content")


def test_a_body_without_a_content_type_is_json(client: TestClient) -> None:
    content = json.dumps({"label": "mine"}).encode()
    request = client.build_request("POST", "/v1/contexts", content=content)
    assert "content-type" not in request.headers
    assert client.send(request).json()["label"] == "mine"
    told(client.post("/v1/contexts", content=b"{"), 400, "JSON")
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # the second is what curl says if it is not told
        told(
            client.post("/v1/contexts", content=content, headers={"Content-Type": kind}), 415, "application/json", kind
        )
    for kind in ("application/json; charset=utf-8", "application/vnd.api+json"):
        assert client.post("/v1/contexts", content=content, headers={"Content-Type": kind}).status_code == 201


def test_a_page_of_somebody_else_changes_nothing(client: TestClient) -> None:
    """What a browser sends for any page without asking first: no Content-Type, or that of a form."""
    for headers in ({}, {"Content-Type": "text/plain"}):
        response = client.post("/v1/contexts", content=b"{}", headers={"Origin": "https://evil.example", **headers})
        told(response, 415, "application/json")
        assert "access-control-allow-origin" not in response.headers
    assert client.get("/v1/contexts").json()["data"] == []


def preflight(client: TestClient, origin: str, method: str = "POST") -> Any:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
    }
    return client.options("/v1/chat/completions", headers=headers)


def test_pages_are_let_in_only_where_they_are_named(make_client: Callable[..., TestClient]) -> None:
    client = make_client()
    assert preflight(client, PAGE).status_code == 405
    client = make_client(cors_origins=(PAGE, "http://localhost:3000"))
    for origin in (PAGE, "http://localhost:3000"):
        allowed = preflight(client, origin)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == origin
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        answer = client.post("/v1/completions", json={**GREEDY, "prompt": "The"}, headers={"Origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
        refused = client.post("/v1/completions", json={}, headers={"Origin": origin})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, origin)
    assert preflight(client, PAGE, "DELETE").status_code == 200
    for origin in ("https://evil.example", PAGE + ".evil.example", "null"):
        response = preflight(client, origin)
        assert response.status_code == 400
        assert "access-control-allow-origin" not in response.headers
    everybody = preflight(make_client(cors_origins=("*",)), "https://anybody.example")
    assert (everybody.status_code, everybody.headers["access-control-allow-origin"]) == (200, "*")


def test_a_page_is_told_that_a_key_is_missing(make_client: Callable[..., TestClient]) -> None:
    client = make_client(cors_origins=(PAGE,), keys=ApiKeys(["a-key-of-16-characters"]))
    assert preflight(client, PAGE).status_code == 200  # a preflight has no key
    response = client.get("/v1/contexts", headers={"Origin": PAGE})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, PAGE)
