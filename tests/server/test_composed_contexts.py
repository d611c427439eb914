"""Contexts from several others, other labels, and adapters for llama.cpp."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_users import User
from limits import files_of_at_most
from starlette.testclient import TestClient

from gakernels import CompactAdapter, GenerativeAdapter
from gakernels.adapters import gguf_export
from gakernels.generation import Sampling, generate
from gakernels.server.settings import ApiKeys, Limits

KEYS = ["first-key-of-16-characters", "second-key-of-16-characters"]


def create(client: TestClient, text: str | None, **options: Any) -> str:
    return str(client.post("/v1/contexts", json={"text": text}, **options).json()["id"])


def compose(client: TestClient, *names: str, **options: Any) -> Any:
    return client.post("/v1/contexts/compose", json={"label": "both", "contexts": names}, **options)


def exported(client: TestClient, name: str, folder: Path) -> CompactAdapter:
    (folder / "compact").write_bytes(client.get(f"/v1/contexts/{name}/export?format=compact").content)
    return CompactAdapter.load(folder / "compact")


def same(first: CompactAdapter, second: CompactAdapter) -> bool:
    return all(
        torch.equal(first.left[layer], second.left[layer]) and torch.equal(first.right[layer], second.right[layer])
        for layer in second.left
    )


def told(response: Any, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert all(word in response.json()["error"]["message"] for word in words), response.text


def test_a_sum_is_what_streams_add_up_to(
    make_client: Callable[..., TestClient],
    demo: GenerativeAdapter,
    make_users: Callable[[int], list[User]],
    tmp_path: Path,
) -> None:
    client, users = make_client(), make_users(2)
    names = [create(client, user.document.text()) for user in users]
    made = compose(client, *names)
    assert made.status_code == 201, made.text
    stream = demo.stream().append(users[0].document.text()).add(demo.stream().append(users[1].document.text()))
    info = made.json()
    assert (info["label"], info["revision"], info["tokens_seen"]) == ("both", 1, stream.tokens_seen)
    assert same(exported(client, info["id"], tmp_path), stream.compact())
    asked = {"model": info["id"], "prompt": [user.question for user in users], "temperature": 0, "max_tokens": 6}
    expected = generate(demo, asked["prompt"], [stream.compact()] * 2, Sampling(6))
    for again in (False, True):
        answers = client.post("/v1/completions", json=asked).json()["choices"]
        assert [answer["text"] for answer in answers] == [row.text for row in expected]
        if not again:
            client = make_client()  # the sum is on disk
    assert [context["id"] for context in client.get("/v1/contexts").json()["data"]].count(info["id"]) == 1
    client.post(f"/v1/contexts/{info['id']}/append", json={"text": "The pet"})
    assert same(exported(client, info["id"], tmp_path), stream.append("The pet").compact())
    assert same(exported(client, names[0], tmp_path), users[0].adapter)  # the parts are as they were


def test_what_is_named_twice_counts_twice(
    client: TestClient, demo: GenerativeAdapter, make_users: Callable[[int], list[User]], tmp_path: Path
) -> None:
    texts = [user.document.text() for user in make_users(2)]
    first, second = (create(client, text) for text in texts)
    made = compose(client, first, second, first).json()
    one, other = (demo.stream().append(text) for text in texts)
    weighted = demo.stream().add(other).add(one, weight=2.0)
    found, expected = exported(client, made["id"], tmp_path), weighted.compact()
    for layer in demo.adapted_names:
        delta, right = (pair.left[layer] @ pair.right[layer].mT for pair in (found, expected))
        assert torch.linalg.norm(delta - right) < 1e-4 * torch.linalg.norm(right)
    assert made["tokens_seen"] == 2 * one.tokens_seen + other.tokens_seen


def test_what_can_not_be_composed_is_refused(make_client: Callable[..., TestClient], tmp_path: Path) -> None:
    client = make_client(keys=ApiKeys(KEYS), limits=Limits(contexts_per_key=3, context_tokens=12))
    mine, theirs = ({"headers": {"Authorization": f"Bearer {key}"}} for key in KEYS)
    full, empty = create(client, "The pet of the town.", **mine), create(client, None, **mine)
    told(compose(client, full, empty, **mine), 409, "empty")
    told(compose(client, full, full, full, **mine), 400, "12 tokens")
    told(compose(client, full, "ctx-" + "0" * 32, **mine), 404, "0000")
    told(compose(client, full, **theirs), 404, full)
    told(compose(client, **mine), 400, "contexts")
    told(compose(client, *[full] * 17, **mine), 400, "contexts")
    assert compose(client, full, **mine).status_code == 201
    told(compose(client, full, **mine), 409, "delete one")
    (tmp_path / "data" / "contexts" / f"{full}.safetensors").unlink()
    told(compose(client, full, **mine), 409, "try again")
    told(compose(client, full, **mine), 404, full)


def test_a_sum_that_can_not_be_written_leaves_nothing(client: TestClient) -> None:
    name = create(client, "The pet of the town.")
    with files_of_at_most(64):
        told(compose(client, name), 503, "written")
    assert [context["id"] for context in client.get("/v1/contexts").json()["data"]] == [name]


def test_a_label_changes_and_nothing_else(make_client: Callable[..., TestClient], tmp_path: Path) -> None:
    client = make_client()
    name = create(client, "The pet of the town.")
    before, adapter = client.get(f"/v1/contexts/{name}").json(), exported(client, name, tmp_path)
    for label in ("mine", "“ä”\n<b>", ""):
        renamed = client.post(f"/v1/contexts/{name}", json={"label": label})
        assert renamed.json() == {**before, "label": label}
        client = make_client(cpu_mebibytes=0, disk_mebibytes=0)  # everything is made again from the file
        assert client.get(f"/v1/contexts/{name}").json() == renamed.json()
        assert same(exported(client, name, tmp_path), adapter)
    told(client.post(f"/v1/contexts/{name}", json={}), 400, "label")
    told(client.post(f"/v1/contexts/{name}", json={"label": "x" * 201}), 400, "label")
    with files_of_at_most(64):
        told(client.post(f"/v1/contexts/{name}", json={"label": "other"}), 503, "as it was")
    assert client.get(f"/v1/contexts/{name}").json()["label"] == ""


def test_a_context_is_renamed_while_it_is_used(make_client: Callable[..., TestClient]) -> None:
    client = make_client(cpu_mebibytes=0, disk_mebibytes=0)  # each answer reads the context's file
    name = create(client, "The pet of the town.")
    asked = {"model": name, "prompt": "The", "max_tokens": 1}
    requests = [
        *([f"/v1/contexts/{name}", {"label": str(number)}] for number in range(20)),
        *([f"/v1/contexts/{name}/append", {"text": "The pet"}] for _ in range(5)),
        *(["/v1/completions", asked] for _ in range(20)),
    ]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda request: client.post(request[0], json=request[1]), requests))
    assert [answer.status_code for answer in answers] == [200] * len(requests), [answer.text for answer in answers]
    assert client.get(f"/v1/contexts/{name}").json()["revision"] == 6


def test_an_adapter_for_llama_cpp(
    client: TestClient,
    demo: GenerativeAdapter,
    make_users: Callable[[int], list[User]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gguf")
    user = make_users(1)[0]
    name = create(client, user.document.text())
    response = client.get(f"/v1/contexts/{name}/export?format=gguf")
    assert f'filename="{name}-1.gguf"' in response.headers["content-disposition"]
    demo.expand(user.adapter).save_gguf(tmp_path / "own.gguf")
    assert response.content == (tmp_path / "own.gguf").read_bytes()
    monkeypatch.setattr(gguf_export, "_OTHER_ARCHITECTURES", {"llama"})
    told(client.get(f"/v1/contexts/{name}/export?format=gguf"), 400, "GGUF", "llama")
