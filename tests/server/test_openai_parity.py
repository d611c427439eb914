"""OpenAI's fields: those that are done, against direct calls and transformers; those that are ignored; the refused."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import GREEDY, complete, create, events, refused
from demo_users import User
from starlette.testclient import TestClient
from torch import Tensor

from gakernels import GenerativeAdapter
from gakernels.generation import Sampling, generate
from gakernels.generation.log_probabilities import TokenLogprob
from gakernels.generation.text_output import token_text
from gakernels.server import protocol
from gakernels.server.answers import CompletionForm, Part, TokenTexts
from gakernels.server.engine import Engine

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture
def user(make_users: Callable[[int], list[User]]) -> User:
    return make_users(1)[0]


def turns(user: User) -> list[dict[str, Any]]:
    question = user.question.removeprefix("Question: ").removesuffix(" Answer:")
    return [{"role": "user", "content": question}]


def chat(client: TestClient, model: str, user: User, /, **values: Any) -> dict[str, Any]:
    body = {"model": model, "messages": turns(user), **GREEDY, **values}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def merged_logprobs(demo: GenerativeAdapter, user: User, tokens: list[int]) -> Tensor:
    """By transformers, on the base model with the adapter merged into its weights: (tokens - 1, vocabulary)."""
    other = copy.deepcopy(demo)
    other.merge(other.expand(user.adapter))
    with torch.no_grad(), other.using({}):
        return torch.log_softmax(other.base(input_ids=torch.tensor([tokens])).logits[0, :-1].double(), -1)


# Log-probabilities


@pytest.mark.parametrize("twisted", [{}, {"temperature": 3.0, "presence_penalty": 2, "logit_bias": {"7": 5}}])
def test_logprobs_of_completions_are_those_of_the_merged_model(
    client: TestClient, demo: GenerativeAdapter, user: User, twisted: dict[str, Any]
) -> None:
    name, ids = create(client, user), list(demo.tokenizer(user.question)["input_ids"])
    answer = complete(client, name, user.question, logprobs=3, echo=True, **twisted)
    choice = answer["choices"][0]
    found = choice["logprobs"]
    assert choice["text"].startswith(user.question)
    assert found["tokens"][: len(ids)] == [token_text(demo.tokenizer, token) for token in ids]
    assert len(found["tokens"]) == len(ids) + answer["usage"]["completion_tokens"]
    vocabulary = {token_text(demo.tokenizer, token): token for token in range(len(demo.tokenizer))}
    tokens = [vocabulary[text] for text in found["tokens"]]
    expected = merged_logprobs(demo, user, tokens)
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    for place, (token, right) in enumerate(zip(tokens[1:], expected, strict=True), start=1):
        assert abs(found["token_logprobs"][place] - right[token]) < 1e-3
        top = found["top_logprobs"][place]
        best = {token_text(demo.tokenizer, int(other)): float(right[other]) for other in right.topk(3).indices}
        assert top.keys() == best.keys() | {found["tokens"][place]}
        assert all(abs(value - right[vocabulary[text]]) < 1e-3 for text, value in top.items())
    for offset, end, text in zip(found["text_offset"], found["text_offset"][1:], found["tokens"], strict=False):
        assert end - offset == len(text)
    plain = complete(client, name, user.question, logprobs=0, **twisted)["choices"][0]["logprobs"]
    assert plain["top_logprobs"] is None
    assert len(plain["tokens"]) == answer["usage"]["completion_tokens"]


def test_a_harness_can_score_a_text_by_echo(client: TestClient, demo: GenerativeAdapter, user: User) -> None:
    """As lm-evaluation-harness does: prompt and answer as the prompt, one more token, whose entry it drops."""
    name, text = create(client, user), f"{user.question} {user.answer}."
    ids, start = list(demo.tokenizer(text)["input_ids"]), len(demo.tokenizer(user.question)["input_ids"])
    values = {"max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    found = complete(client, name, [ids], **values)["choices"][0]["logprobs"]
    score = sum(found["token_logprobs"][start:-1])
    expected = merged_logprobs(demo, user, ids)
    assert abs(score - sum(float(expected[place - 1, ids[place]]) for place in range(start, len(ids)))) < 1e-3


@pytest.mark.parametrize("n", [1, 2])
def test_logprobs_of_a_chat_and_of_its_stream(client: TestClient, demo: GenerativeAdapter, user: User, n: int) -> None:
    name, asked = create(client, user), {"logprobs": True, "top_logprobs": 2, "n": n, "stop": ["."], "max_tokens": 9}
    whole = chat(client, name, user, **asked)
    for choice in whole["choices"]:
        entries = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries).startswith(choice["message"]["content"])
        for entry in entries:
            assert bytes(entry["bytes"]).decode() == entry["token"]
            assert len(entry["top_logprobs"]) == 2
            assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]  # greedy
            assert -100 < entry["logprob"] <= 0
    assert sum(len(choice["logprobs"]["content"]) for choice in whole["choices"]) == whole["usage"]["completion_tokens"]
    body = {"model": name, "messages": turns(user), **GREEDY, **asked, "stream": True}
    pieces = events(client.post("/v1/chat/completions", json=body).text)
    for index in range(n):
        mine = [event["choices"][0] for event in pieces if event["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        streamed = [entry for choice in mine if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert [entry["token"] for entry in streamed] == [
            entry["token"] for entry in whole["choices"][index]["logprobs"]["content"]
        ]
    assert chat(client, name, user)["choices"][0]["logprobs"] is None


def test_a_streamed_completion_with_everything_is_the_whole_one(client: TestClient, user: User) -> None:
    name, asked = create(client, user), {"logprobs": 2, "echo": True, "n": 2, "best_of": 2}
    prompts = [user.question, "The pet"]
    whole = complete(client, name, prompts, **asked)
    body = {"model": name, "prompt": prompts, **GREEDY, **asked, "stream": True}
    pieces = events(client.post("/v1/completions", json=body).text)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in pieces if event["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert choice["text"].startswith(prompts[choice["index"] // 2])
        for name in ("tokens", "text_offset"):
            assert [value for one in mine for value in one["logprobs"][name]] == choice["logprobs"][name]


def test_what_json_has_no_number_for(demo: GenerativeAdapter) -> None:
    form = CompletionForm(TokenTexts(demo.tokenizer), 1)
    impossible = TokenLogprob(5, -math.inf, ((6, 0.0),))
    found = form.choice(Part(0, "", [impossible])).logprobs
    assert found is not None
    assert found.token_logprobs == [-9999.0]
    assert TokenTexts(None)(5) == "token_id:5"


# Several answers


def test_several_answers_are_those_of_the_seeds_that_follow(
    client: TestClient, demo: GenerativeAdapter, user: User
) -> None:
    name, hot = create(client, user), {"temperature": 3.0, "seed": -7, "max_tokens": 12}
    answer = complete(client, name, user.question, n=4, **hot)
    expected = [
        generate(demo, [user.question], [user.adapter], Sampling(12, 3.0, seed=seed))[0].text for seed in range(-7, -3)
    ]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert len(set(expected)) > 1
    prompt = len(demo.tokenizer(user.question)["input_ids"])
    assert answer["usage"]["prompt_tokens"] == prompt  # once
    assert answer["usage"]["completion_tokens"] <= 4 * 12
    messages = {choice["message"]["content"] for choice in chat(client, name, user, n=4, **hot)["choices"]}
    assert len(messages) > 1


# Penalties and biases


def test_what_is_asked_for_reaches_the_decoder(
    client: TestClient, demo: GenerativeAdapter, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, submit = [], Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda own, row: (asked.append(row.sampling), submit(own, row))[1])
    common: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": -0.25, "temperature": 0.7, "top_p": 0.9}
    values = {**common, "seed": 3, "logit_bias": {"9": 4, "7": -1.5}, "stop": ["."], "max_tokens": 5}
    sampling = Sampling(5, seed=3, stop=(".",), logit_bias=((9, 4.0), (7, -1.5)), **common)
    complete(client, "demo", user.question, logprobs=2, echo=True, **values)
    assert asked.pop() == replace(sampling, logprobs=2, prompt_logprobs=True)
    chat(client, "demo", user, logprobs=True, **values)
    assert asked.pop() == replace(sampling, logprobs=0)
    chat(client, "demo", user, **values)
    assert asked.pop() == sampling


def test_a_banned_token_does_not_come(client: TestClient, demo: GenerativeAdapter, user: User) -> None:
    name, first = create(client, user), list(demo.tokenizer(f" {user.answer}")["input_ids"])
    assert complete(client, name, user.question, max_tokens=20)["choices"][0]["text"].startswith(f" {user.answer}")
    banned = complete(client, name, user.question, logit_bias={str(token): -100 for token in first})
    assert not banned["choices"][0]["text"].startswith(f" {user.answer}")


# What changes nothing

IDLE: dict[str, list[Any]] = {
    "user": ["somebody", {"name": "Toso", "role": "admin"}],
    "metadata": [{}, {"task": "title"}],
    "store": [True, False],
    "service_tier": ["auto"],
    "safety_identifier": ["x"],
    "prompt_cache_key": ["x"],
    "prompt_cache_options": [{}],
    "prompt_cache_retention": ["24h"],
    "seed": [1],
    "presence_penalty": [0, 0.0],
    "frequency_penalty": [0, 0.0],
    "logit_bias": [{}],
    "n": [1],
    "top_p": [1, 1.0],
    "stop": [[]],
    "stream": [False],
    "stream_options": [{"include_usage": True, "include_obfuscation": False}],
}
IDLE_COMPLETION = {**IDLE, "best_of": [1], "suffix": [""], "echo": [False]}
IDLE_CHAT = {
    **IDLE,
    "reasoning_effort": ["low"],
    "verbosity": ["low"],
    "prediction": [{"type": "content", "content": "a"}],
    "parallel_tool_calls": [True],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "logprobs": [False],
}


def test_fields_that_ask_for_nothing_change_nothing(client: TestClient, user: User) -> None:
    name = create(client, user)
    text = complete(client, name, user.question)["choices"]
    for field, values in IDLE_COMPLETION.items():
        for value in values:
            assert complete(client, name, user.question, **{field: value})["choices"] == text, (field, value)
    turn = chat(client, name, user)["choices"]
    for field, values in IDLE_CHAT.items():
        for value in values:
            assert chat(client, name, user, **{field: value})["choices"] == turn, (field, value)


# What is refused

TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.mark.parametrize(
    ("values", "param", "word"),
    [
        ({"tools": [TOOL]}, "tools", "no tools"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"functions": [{"name": "look"}]}, "functions", "no tools"),
        ({"function_call": {"name": "look"}}, "function_call", "no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "type must be 'text'"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "type must be 'text'"),
        ({"modalities": ["text", "audio"]}, "modalities", "answers are text"),
        ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio", "answers are text"),
        ({"web_search_options": {}}, "web_search_options", "has no web search"),
        ({"moderation": {}}, "moderation", "has no moderation"),
        ({"top_logprobs": 2}, None, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"n": 17}, "n", "17 answers"),
        ({"temprature": 1}, "temprature", "not permitted"),
        ({"messages": []}, "messages", "at least 1"),
    ],
)
def test_what_can_not_be_done_is_refused_with_the_reason(
    client: TestClient, user: User, values: dict[str, Any], param: str | None, word: str
) -> None:
    response = client.post("/v1/chat/completions", json={"model": "demo", "messages": turns(user), **values})
    refused(response, 400, word)
    assert (response.json()["error"]["param"], response.json()["error"]["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "http://example.org"}}]}, "reads text only"),
        ({"content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}, "reads text only"),
        ({"content": [{"type": "file", "file": {"file_id": "a"}}]}, "reads text only"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "no tools"),
        ({"role": "assistant", "function_call": {"name": "look"}}, "no tools"),
        ({"role": "tool"}, "role"),
        ({"content": 5}, "content"),
    ],
)
def test_messages_that_are_not_text_are_refused(client: TestClient, message: dict[str, Any], word: str) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Who?", **message}]}
    refused(client.post("/v1/chat/completions", json=body), 400, word)


@pytest.mark.parametrize(
    "path", ["embeddings", "responses", "audio/speech", "images/generations", "moderations", "files"]
)
def test_other_parts_of_the_interface_are_refused_by_name(client: TestClient, path: str) -> None:
    response = client.post(f"/v1/{path}", json={"model": "demo", "input": "text"})
    refused(response, 404, f"POST /v1/{path}")
    assert "/v1/chat/completions" in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "unknown_url"


# The table of the docs


def table(title: str) -> dict[str, str]:
    """The fields of a table in docs/serving.md, and what it says about each: done, ignored or refused."""
    section = DOCS.read_text().split(f"\n{title}\n", 1)[1].strip().split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines()[2:]]
    return {name.strip(" `"): state.strip() for names, state, *_ in rows for name in names.split(",")}


@pytest.mark.parametrize(
    ("title", "model", "idle"),
    [
        ("#### Completions, field by field", protocol.CompletionRequest, IDLE_COMPLETION),
        ("#### Chat completions, field by field", protocol.ChatRequest, IDLE_CHAT),
    ],
)
def test_the_docs_have_every_field(title: str, model: type[protocol.Request], idle: dict[str, list[Any]]) -> None:
    documented = table(title)
    assert documented.keys() == model.model_fields.keys()
    for name, state in documented.items():
        passed_on = not model.model_fields[name].exclude or name in ("context", "best_of")
        assert (state == "done") == passed_on, name
        assert state in ("done", "ignored", "refused"), name
        assert state != "ignored" or name in idle, name


@pytest.mark.parametrize("kind", ["completions", "chat.completions"])
def test_the_docs_have_every_field_of_the_official_client(kind: str) -> None:
    types = pytest.importorskip("openai.types", reason="openai is not installed: pip install gakernels[clients]")
    module = types.completion_create_params if kind == "completions" else types.chat.completion_create_params
    fields = set(module.CompletionCreateParamsBase.__annotations__) | {"stream"}
    title = "Completions" if kind == "completions" else "Chat completions"
    assert fields <= table(f"#### {title}, field by field").keys()
