"""The server's answers: contexts, completions, chat, streams, keys, limits and errors."""

import gc
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import GREEDY, complete, create, events, refused
from demo_users import User
from limits import files_of_at_most
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load
from starlette.testclient import TestClient

from gakernels import Adapter, CompactAdapter, GenerativeAdapter
from gakernels.cli.serve import DEMO_CHAT_TEMPLATE
from gakernels.generation import Sampling, generate
from gakernels.server.settings import ApiKeys, Limits

KEYS = ["first-key-of-16-characters", "second-key-of-16-characters"]


def expected(demo: GenerativeAdapter, user: User, count: int = 6, **values: Any) -> str:
    return generate(demo, [user.question], [user.adapter], Sampling(count, **values))[0].text


@pytest.fixture
def user(make_users: Callable[[int], list[User]]) -> User:
    return make_users(1)[0]


def test_a_context_is_the_model_of_a_request(client: TestClient, demo: GenerativeAdapter, user: User) -> None:
    name = create(client, user)
    answer = complete(client, name, user.question)
    choice = answer["choices"][0]
    assert choice["text"] == expected(demo, user)
    assert (answer["object"], answer["model"], choice["index"]) == ("text_completion", name, 0)
    assert choice["finish_reason"] == "length"
    prompt = len(demo.tokenizer(user.question)["input_ids"])
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 6, "total_tokens": prompt + 6}
    stopped = complete(client, name, user.question, stop=".", max_tokens=20)["choices"][0]
    assert stopped == {"index": 0, "text": f" {user.answer}", "finish_reason": "stop", "logprobs": None}
    plain = generate(demo, [user.question], [None], Sampling(6))[0].text
    assert complete(client, "demo", user.question)["choices"][0]["text"] == plain
    empty = client.post("/v1/contexts", json={}).json()["id"]  # nothing appended yet: the base model
    assert complete(client, empty, user.question)["choices"][0]["text"] == plain


def test_contexts_grow_and_are_listed_and_deleted(client: TestClient, demo: GenerativeAdapter, user: User) -> None:
    text = user.document.text()
    half = text.index(". ", len(text) // 2) + 2
    made = client.post("/v1/contexts", json={"label": "mine"}).json()
    assert (made["revision"], made["tokens_seen"], made["label"], made["adapter_bytes"]) == (0, 0, "mine", 0)
    path = f"/v1/contexts/{made['id']}"
    for revision, part in enumerate((text[:half], text[half:])):
        grown = client.post(f"{path}/append", json={"text": part, "revision": revision}).json()
    stream = demo.stream().append(text[:half]).append(text[half:])
    assert (grown["revision"], grown["tokens_seen"]) == (2, stream.tokens_seen)
    assert grown["adapter_bytes"] == stream.compact().nbytes
    assert client.get(path).json() == grown
    assert client.get("/v1/contexts").json()["data"] == [grown]
    answer = generate(demo, [user.question], [stream.compact()], Sampling(6))[0].text
    assert complete(client, made["id"], user.question)["choices"][0]["text"] == answer
    models = client.get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in models] == [("demo", None), (made["id"], "demo")]
    assert client.get(f"/v1/models/{made['id']}").json() == models[1]
    assert client.delete(path).json() == {"id": made["id"], "object": "context", "deleted": True}
    for response in (
        client.get(path),
        client.delete(path),
        client.get(f"{path}/export"),
        client.post(f"{path}/append", json={"text": "w"}),
        client.post("/v1/completions", json={"model": made["id"], "prompt": "Question"}),
        client.get(f"/v1/models/{made['id']}"),
    ):
        refused(response, 404, made["id"])
    assert client.get("/v1/contexts").json()["data"] == []


def test_exports_are_what_a_stream_would_have_become(
    client: TestClient, demo: GenerativeAdapter, user: User, tmp_path: Path
) -> None:
    name = create(client, user)
    files = {}
    for form in ("compact", "adapter", "peft"):
        response = client.get(f"/v1/contexts/{name}/export", params={"format": form})
        assert response.status_code == 200
        assert name in response.headers["content-disposition"]
        files[form] = response.content
    (tmp_path / "compact").write_bytes(files["compact"])
    (tmp_path / "adapter").write_bytes(files["adapter"])
    compact, adapter = CompactAdapter.load(tmp_path / "compact"), Adapter.load(tmp_path / "adapter")
    for layer in demo.adapted_names:
        assert torch.equal(compact.left[layer], user.adapter.left[layer])
        assert torch.equal(compact.right[layer], user.adapter.right[layer])
        assert torch.equal(adapter.lora_a[layer], demo.expand(user.adapter).lora_a[layer])
    archive = zipfile.ZipFile(io.BytesIO(files["peft"]))
    assert archive.namelist() == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads(archive.read("adapter_config.json"))["peft_type"] == "LORA"
    factors = load(archive.read("adapter_model.safetensors"))
    for layer in demo.adapted_names:
        delta = (factors[f"base_model.model.{layer}.lora_{half}.weight"] for half in "BA")
        assert (torch.linalg.multi_dot(list(delta)) - adapter.delta(layer)).abs().max() < 1e-5
    empty = client.post("/v1/contexts", json={}).json()["id"]
    refused(client.get(f"/v1/contexts/{empty}/export"), 409, "empty")


def test_chat_uses_the_template(client: TestClient, demo: GenerativeAdapter, user: User) -> None:
    name = create(client, user)
    question = user.question.removeprefix("Question: ").removesuffix(" Answer:")
    body = {"model": name, "messages": [{"role": "user", "content": question}], "temperature": 0, "stop": ["."]}
    answer = client.post("/v1/chat/completions", json=body).json()
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": f" {user.answer}"}
    assert (choice["finish_reason"], answer["object"]) == ("stop", "chat.completion")
    limited = client.post("/v1/chat/completions", json={**body, "max_completion_tokens": 1}).json()
    assert limited["usage"]["completion_tokens"] == 1
    streamed = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    deltas = [event["choices"][0]["delta"] for event in streamed]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == f" {user.answer}"
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_chat_uses_the_template_that_the_generator_was_tuned_with(
    make_client: Callable[..., TestClient], demo: GenerativeAdapter, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "tokenizer", demo.tokenizer)
    monkeypatch.setattr(demo, "chat_template", None)
    demo.use_chat_template(DEMO_CHAT_TEMPLATE)
    client = make_client(chat_template=None)
    question = user.question.removeprefix("Question: ").removesuffix(" Answer:")
    messages = [{"role": "user", "content": question}]
    body = {"model": create(client, user), "messages": messages, "temperature": 0, "stop": ["."]}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == f" {user.answer}"


def test_without_a_template_chat_is_refused(make_client: Callable[..., TestClient]) -> None:
    client = make_client(chat_template=None)
    body = {"model": "demo", "messages": [{"role": "user", "content": "Who?"}]}
    refused(client.post("/v1/chat/completions", json=body), 400, "--chat-template")
    client = make_client(chat_template="{{ raise_exception('no such turn') }}")
    refused(client.post("/v1/chat/completions", json=body), 400, "no such turn")


def test_a_stream_brings_the_same_text_in_pieces(client: TestClient, user: User) -> None:
    name = create(client, user)
    whole = complete(client, name, [user.question] * 2, max_tokens=9)
    body = {"model": name, "prompt": [user.question] * 2, **GREEDY, "max_tokens": 9, "stream": True}
    response = client.post("/v1/completions", json={**body, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    pieces = events(response.text)
    assert pieces[-1]["usage"] == whole["usage"]
    assert pieces.pop()["choices"] == []
    for index in range(2):
        mine = [event["choices"][0] for event in pieces if event["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == whole["choices"][index]["text"]
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
        assert len(mine) > 5
    assert {event["id"] for event in pieces} == {pieces[0]["id"]}


def test_prompts_may_be_tokens_and_several(client: TestClient, demo: GenerativeAdapter, user: User) -> None:
    name = create(client, user)
    tokens = list(demo.tokenizer(user.question)["input_ids"])
    right = expected(demo, user)
    for prompt in (tokens, [tokens], [user.question, user.question], [tokens, tokens[:3]]):
        choices = complete(client, name, prompt)["choices"]
        assert choices[0]["text"] == right
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
    appended = client.post(f"/v1/contexts/{name}/append", json={"tokens": tokens}).json()
    assert appended["tokens_seen"] == user.adapter.tokens_seen + len(tokens)


def test_drawn_texts_repeat_with_a_seed(client: TestClient, user: User) -> None:
    name, drawn = create(client, user), {"temperature": 3.0, "max_tokens": 12}
    texts = [complete(client, name, user.question, seed=5, **drawn)["choices"][0]["text"] for _ in range(2)]
    assert texts[0] == texts[1]
    others = {complete(client, name, user.question, **drawn)["choices"][0]["text"] for _ in range(4)}
    assert len(others) > 1
    first = complete(client, name, user.question, top_k=1, **drawn)["choices"][0]["text"]
    assert first == complete(client, name, user.question, max_tokens=12)["choices"][0]["text"]


def test_each_key_sees_its_own_contexts_only(make_client: Callable[..., TestClient], user: User) -> None:
    client = make_client(keys=ApiKeys(KEYS))
    mine, others = ({"headers": {"Authorization": f"Bearer {key}"}} for key in KEYS)
    name = create(client, user, **mine)
    body = {"model": name, "prompt": user.question, **GREEDY}
    requests: list[Callable[..., Any]] = [
        lambda **options: client.get(f"/v1/contexts/{name}", **options),
        lambda **options: client.get(f"/v1/contexts/{name}/export", **options),
        lambda **options: client.get(f"/v1/models/{name}", **options),
        lambda **options: client.post(f"/v1/contexts/{name}/append", json={"text": "The"}, **options),
        lambda **options: client.post(f"/v1/contexts/{name}", json={"label": "The"}, **options),
        lambda **options: client.post("/v1/completions", json=body, **options),
        lambda **options: client.delete(f"/v1/contexts/{name}", **options),
    ]
    wrong = [
        {},
        *({"headers": {"Authorization": text}} for text in ("Bearer", "Bearer x", f"Basic {KEYS[0]}", b"\xff")),
    ]
    for send in requests:
        refused(send(**others), 404)
        for options in wrong:
            refused(send(**options), 401)
    for path in ("/v1/contexts", "/v1/models"):
        assert name not in client.get(path, **others).text
        assert name in client.get(path, **mine).text
        refused(client.get(path), 401)
    refused(client.post("/v1/contexts", json={}), 401)
    for send in requests:
        assert send(**mine).status_code == 200
    assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_limits_are_kept(make_client: Callable[..., TestClient], user: User) -> None:
    limits = Limits(contexts=3, contexts_per_key=2, body_bytes=3000, append_tokens=50, context_tokens=60, prompts=2)
    client = make_client(keys=ApiKeys(KEYS), limits=limits)
    first, second = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    refused(client.post("/v1/contexts", json={"text": user.document.text()}, headers=first), 400, "50 tokens")
    names = [client.post("/v1/contexts", json={}, headers=first).json()["id"] for _ in range(2)]
    refused(client.post("/v1/contexts", json={}, headers=first), 409, "delete one")
    assert client.post("/v1/contexts", json={}, headers=second).status_code == 201
    refused(client.post("/v1/contexts", json={}, headers=second), 409)  # three in all
    append = f"/v1/contexts/{names[0]}/append"
    assert client.post(append, json={"tokens": [5] * 50}, headers=first).status_code == 200
    refused(client.post(append, json={"tokens": [5] * 11}, headers=first), 400, "60 tokens")
    refused(client.post(append, json={"text": "x" * 3000}, headers=first), 413, "3000 bytes")
    chunks: Iterator[bytes] = iter([b"x" * 1000] * 5)  # no content length is announced
    refused(client.post(append, content=chunks, headers=first), 413)
    body = {"model": names[0], "prompt": [[5]] * 3}
    refused(client.post("/v1/completions", json=body, headers=first), 400, "2 prompts")
    assert client.get(f"/v1/contexts/{names[0]}", headers=first).json()["revision"] == 1


def test_a_text_that_the_cache_has_no_room_for_is_refused(make_client: Callable[..., TestClient]) -> None:
    client = make_client(limits=Limits(cache_tokens=100))
    body = {"model": "demo", "prompt": [5] * 90, "max_tokens": 11}
    refused(client.post("/v1/completions", json=body), 400, "100 tokens")
    assert client.post("/v1/completions", json={**body, "max_tokens": 10}).status_code == 200


def test_too_much_at_a_time_is_refused_for_now(make_client: Callable[..., TestClient]) -> None:
    client = make_client(limits=Limits(waiting=2))
    response = client.post("/v1/completions", json={"model": "demo", "prompt": [[5]] * 3, "max_tokens": 2})
    refused(response, 503, "try again later")
    assert response.headers["retry-after"] == "1"
    for _ in range(5):  # and what was let in has left
        assert complete(client, "demo", [5], max_tokens=1)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("values", "status", "word"),
    [
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": [5, -1]}, 400, "prompt"),
        ({"prompt": [5, 10**9]}, 400, "token ids must be between"),
        ({"prompt": [5, "a"]}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 5000}, 400, "max_tokens may be 4096"),
        ({"max_tokens": 1020}, 400, "the model reads 1024 tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["a"] * 9}, 400, "stop"),
        ({"n": 0}, 400, "n"),
        ({"n": 17}, 400, "17 answers"),
        ({"n": 3, "prompt": [[5]] * 6}, 400, "6 with 3 answers each"),
        ({"best_of": 2}, 400, "best_of must be 1 or n"),
        ({"suffix": "end"}, 400, "suffix"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"presence_penalty": 2.1}, 400, "presence_penalty"),
        ({"frequency_penalty": "high"}, 400, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
        ({"logit_bias": {"837": 1}}, 400, "token ids must be between 0 and 836"),
        ({"logit_bias": {"word": 1}}, 400, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, 400, "logit_bias"),
        ({"max_new_tokens": 5}, 400, "max_new_tokens"),
        ({"echo": True, "prompt": [10**9]}, 400, "token ids must be between"),
        ({"seed": 2**63}, 400, "seed"),
        ({"model": ""}, 400, "model"),
        ({"model": "nobody"}, 404, "nobody"),
        ({"model": "../../etc/passwd"}, 404, "no model"),
        ({"model": "ctx-" + "0" * 32}, 404, "no model"),
    ],
)
def test_malformed_completions_are_told_so(client: TestClient, values: dict, status: int, word: str) -> None:
    body = {"model": "demo", "prompt": "Question: What Answer:", "max_tokens": 5, **values}
    refused(client.post("/v1/completions", json=body), status, word)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b'{"text": 5}',
        b'{"text": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"label": "' + b"x" * 300 + b'"}',
        b'{"text": "   "}',
        b"[" * 100_000,
        b'{"text": NaN}',
        b"1" * 10_000,
        b"\xff\xfe",
        b'{"text": "a", "a": 1e400}',
    ],
)
def test_malformed_bodies_are_told_so(client: TestClient, content: bytes) -> None:
    refused(client.post("/v1/contexts", content=content, headers={"Content-Type": "application/json"}), 400)
    assert client.get("/v1/contexts").json()["data"] == []


def test_appends_are_checked(client: TestClient, user: User) -> None:
    name = create(client, user)
    for body, status in (
        ({}, 400),
        ({"text": "The", "tokens": [5]}, 400),
        ({"tokens": []}, 400),
        ({"tokens": [837]}, 400),
        ({"text": ""}, 400),
        ({"text": "The", "revision": 0}, 409),
        ({"text": "The", "revision": 2}, 409),
        ({"text": "The", "revision": -1}, 400),
    ):
        refused(client.post(f"/v1/contexts/{name}/append", json=body), status)
    assert client.get(f"/v1/contexts/{name}").json()["revision"] == 1


@pytest.mark.parametrize("path", ["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "ctx-", "a" * 500, "%00", "lock", "\u202e"])
def test_paths_lead_nowhere(client: TestClient, path: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for method in ("GET", "DELETE", "POST"):
        for end in ("", "/export", "/append"):
            body = {"text": "The"} if end else {"label": "The"}
            response = client.request(method, f"/v1/contexts/{path}{end}", json=body)
            assert response.status_code in (404, 405), (method, end)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_server_that_ends_properly_loses_nothing(make_client: Callable[..., TestClient], user: User) -> None:
    client = make_client()
    name = create(client, user)
    before = client.get(f"/v1/contexts/{name}").json()
    answer = complete(client, name, user.question)["choices"]
    client = make_client()
    assert client.get(f"/v1/contexts/{name}").json() == before
    assert complete(client, name, user.question)["choices"] == answer


def test_a_full_disk_is_told_and_the_context_stays_as_it_was(client: TestClient, user: User) -> None:
    name = create(client, user)
    with files_of_at_most(64):
        refused(client.post(f"/v1/contexts/{name}/append", json={"text": "The pet"}), 503, "as it was")
        refused(client.post("/v1/contexts", json={}), 503, "could not be written")
    info = client.get(f"/v1/contexts/{name}").json()
    assert (info["revision"], len(client.get("/v1/contexts").json()["data"])) == (1, 1)
    assert client.post(f"/v1/contexts/{name}/append", json={"text": "The pet", "revision": 1}).status_code == 200


def test_a_damaged_context_is_told_without_its_path(client: TestClient, user: User, tmp_path: Path) -> None:
    name = create(client, user)
    client.post(f"/v1/contexts/{name}/append", json={"text": "The pet"})
    path = tmp_path / "data" / "contexts" / f"{name}.safetensors"
    (tmp_path / "damaged").write_bytes(path.read_bytes()[:-5])
    (tmp_path / "damaged").replace(path)  # another file: the server may still be looking into the one that is there
    response = client.post(f"/v1/contexts/{name}/append", json={"text": "The pet"})
    refused(response, 500, "log")
    assert str(tmp_path) not in response.text
    assert client.get("/health").status_code == 200


def test_health_and_metrics(client: TestClient, user: User) -> None:
    name = create(client, user)
    answer = complete(client, name, user.question)
    assert client.get("/health").json() == {"status": "ok", "model": "demo", "contexts": 1, "damaged_contexts": 0}
    client.get("/nowhere/at/all")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    page = response.text
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    usage = answer["usage"]
    for line in (
        'gakernels_requests_total{method="POST",route="/v1/completions",status="200"} 1',
        'gakernels_requests_total{method="GET",route="other",status="404"} 1',
        f"gakernels_new_tokens_total {usage['completion_tokens']}",
        f"gakernels_prompt_tokens_total {usage['prompt_tokens']}",
        f"gakernels_context_tokens_total {user.adapter.tokens_seen}",
        "gakernels_contexts 1",
        'gakernels_adapter_cache_entries{tier="cpu"} 1',
        f'gakernels_adapter_cache_used_bytes{{tier="cpu"}} {user.adapter.nbytes}',
        "gakernels_adapter_misses_total 1",
        'gakernels_request_seconds_count{route="/v1/completions"} 1',
        'gakernels_requests_total{method="GET",route="/health",status="200"} 1',
    ):
        sample, value = line.rsplit(" ", 1)
        assert float(values[sample]) == float(value), line
    assert name not in page
    assert {family.name: family.type for family in text_string_to_metric_families(page)} == {
        "gakernels_requests": "counter",
        "gakernels_request_seconds": "histogram",
        "gakernels_prompt_tokens": "counter",
        "gakernels_new_tokens": "counter",
        "gakernels_context_tokens": "counter",
        "gakernels_contexts": "gauge",
        "gakernels_rows_running": "gauge",
        "gakernels_waiting": "gauge",
        "gakernels_adapter_misses": "counter",
        "gakernels_adapter_cache_used_bytes": "gauge",
        "gakernels_adapter_cache_limit_bytes": "gauge",
        "gakernels_adapter_cache_entries": "gauge",
        "gakernels_adapter_cache_hits": "counter",
        "gakernels_adapter_cache_evictions": "counter",
    }


def use(client: TestClient, name: str, times: int) -> None:
    for _ in range(times):
        assert client.post(f"/v1/contexts/{name}/append", json={"tokens": [5]}).status_code == 200
        for _ in range(2):  # the first may find the adapter that the append has made
            complete(client, name, "The", max_tokens=1)


def test_use_leaves_nothing_in_memory(make_client: Callable[..., TestClient]) -> None:
    client = make_client(cpu_mebibytes=0)  # every adapter goes to the disk and comes from there
    name = client.post("/v1/contexts", json={}).json()["id"]
    blocks = []
    for _ in range(2):
        use(client, name, 20)
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    assert blocks[1] - blocks[0] < 400


def test_no_adapter_waits_for_the_garbage_collector(make_client: Callable[..., TestClient]) -> None:
    client = make_client(cpu_mebibytes=0)
    name = client.post("/v1/contexts", json={}).json()["id"]

    def adapters() -> int:
        return sum(type(item) is CompactAdapter for item in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = adapters()
        use(client, name, 10)
        assert adapters() < before + 5
    finally:
        gc.enable()


def test_the_schema_tells_what_the_server_answers(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    assert len(operations) == 14
    assert not any("422" in operation["responses"] for operation in operations)
