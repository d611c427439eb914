"""What happens to a running server's files: folders removed, files replaced, the clock set back, another server."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from demo_users import User
from limits import files_of_at_most
from starlette.testclient import TestClient

from gakernels import GenerativeAdapter
from gakernels.cli import main
from gakernels.server.context_store import ContextStore

GREEDY = {"temperature": 0, "max_tokens": 6}


def create(client: TestClient, *texts: str) -> str:
    name = client.post("/v1/contexts", json={}).json()["id"]
    for text in texts:
        assert append(client, name, text).status_code == 200
    return str(name)


def append(client: TestClient, name: str, text: str, **values: Any) -> Any:
    return client.post(f"/v1/contexts/{name}/append", json={"text": text, **values})


def ask(client: TestClient, name: str, question: str, **values: Any) -> Any:
    return client.post("/v1/completions", json={"model": name, "prompt": question, **GREEDY, **values})


def text(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def replace(path: Path, content: bytes) -> None:
    """Another file of that name, in one step: the server may be looking into the one that is there."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def everything(client: TestClient, name: str) -> list[Any]:
    """One request of each kind for a context, the one that removes it last."""
    path = f"/v1/contexts/{name}"
    turns = [{"role": "user", "content": "Who?"}]
    return [
        client.get("/v1/contexts"),
        client.get(path),
        append(client, name, "The pet"),
        client.get(f"{path}/export"),
        client.post(path, json={"label": "mine"}),
        ask(client, name, "The"),
        ask(client, name, "The", stream=True),
        client.post("/v1/chat/completions", json={"model": name, "messages": turns, "max_tokens": 1}),
        client.delete(path),
        client.get(path),
    ]


def well(client: TestClient) -> None:
    """It still does everything."""
    name = create(client, "The pet of Toso Zelwin is grey hamster.")
    *answers, gone = everything(client, name)
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    assert gone.status_code == 404


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    return tmp_path / "data" / "contexts"


@pytest.mark.parametrize("what", ["contexts", "adapters", "exports", "."])
@pytest.mark.parametrize("cached", [True, False])
def test_a_folder_is_removed(make_client: Callable[..., TestClient], tmp_path: Path, what: str, cached: bool) -> None:
    client = make_client(cpu_mebibytes=64 if cached else 0, disk_mebibytes=64 if cached else 0)
    names = [create(client, "The pet of Toso Zelwin is grey hamster.") for _ in range(3)]
    shutil.rmtree(tmp_path / "data" / what, ignore_errors=True)  # without a cache there are no `adapters`
    for answer in (answer for name in names for answer in everything(client, name)):
        assert answer.status_code in (200, 404), answer.text
        assert str(tmp_path) not in answer.text
        assert "internal_error" not in answer.text
    well(client)
    assert client.get("/health").status_code == 200
    kept = create(client, "The pet")
    assert kept in make_client().get("/v1/contexts").text  # it is where the next server looks for it


def test_a_folder_is_moved_away(make_client: Callable[..., TestClient], contexts: Path) -> None:
    client = make_client()
    name = create(client, "The pet")
    contexts.rename(contexts.with_name("elsewhere"))
    fresh = create(client, "The job")
    assert append(client, name, "The pet").status_code == 404
    assert client.get("/v1/contexts").json()["data"] == [client.get(f"/v1/contexts/{fresh}").json()]
    assert [path.stem for path in contexts.glob("ctx-*")] == [fresh]


def test_a_context_whose_file_is_removed_is_gone(make_client: Callable[..., TestClient], contexts: Path) -> None:
    for change in ("append", "ask", "stream", "export", "chat", "delete"):
        client = make_client(cpu_mebibytes=0, disk_mebibytes=0)
        name, other = create(client, "The pet"), create(client, "The pet")
        ask(client, name, "The")  # what was made ahead of need is out of the way
        (contexts / f"{name}.safetensors").unlink()
        if change == "append":
            assert append(client, name, "The").status_code == 404
        elif change == "ask":
            assert ask(client, name, "The").status_code == 404
        elif change == "stream":
            assert "model_not_found" in ask(client, name, "The", stream=True).text
        elif change == "export":
            assert client.get(f"/v1/contexts/{name}/export").status_code == 404
        elif change == "chat":
            turns = {"model": name, "messages": [{"role": "user", "content": "Who?"}]}
            assert client.post("/v1/chat/completions", json=turns).status_code == 404
        else:
            assert client.delete(f"/v1/contexts/{name}").status_code == 200
        assert name not in client.get("/v1/contexts").text
        assert client.delete(f"/v1/contexts/{other}").status_code == 200


def test_an_older_state_comes_back(
    make_client: Callable[..., TestClient], make_users: Callable[[int], list[User]], contexts: Path
) -> None:
    """A backup: the file counts, and no adapter of the history that was undone is used under the same revision."""
    client = make_client()
    first, second = make_users(2)
    name = create(client, "The")
    path = contexts / f"{name}.safetensors"
    backup = path.read_bytes()
    assert append(client, name, first.document.text()).status_code == 200
    ask(client, name, first.question)  # its adapter is in the cache, as revision 2
    replace(path, backup)
    changed = append(client, name, second.document.text())
    assert (changed.status_code, changed.json()["error"]["code"]) == (409, "wrong_revision")
    assert client.get(f"/v1/contexts/{name}").json()["revision"] == 1
    assert append(client, name, second.document.text(), revision=1).json()["revision"] == 2
    plain = create(client, "The", second.document.text())
    for question in (first.question, second.question):
        assert text(ask(client, name, question)) == text(ask(client, plain, question))


def test_an_older_state_comes_back_and_is_asked(make_client: Callable[..., TestClient], contexts: Path) -> None:
    client = make_client(cpu_mebibytes=0, disk_mebibytes=0)
    name = create(client, "The pet of Toso Zelwin is grey hamster.")
    path = contexts / f"{name}.safetensors"
    backup, before = path.read_bytes(), text(ask(client, name, "Question: What"))
    append(client, name, "The job of Toso Zelwin is kite mender.")
    ask(client, name, "The")  # what was made ahead of need is out of the way
    replace(path, backup)
    assert text(ask(client, name, "Question: What")) == before
    assert client.get(f"/v1/contexts/{name}").json()["revision"] == 1


def test_the_context_of_another_takes_its_place(make_client: Callable[..., TestClient], contexts: Path) -> None:
    client = make_client(cpu_mebibytes=0, disk_mebibytes=0)
    name, other = create(client, "The pet"), create(client, "The job")
    path = contexts / f"{name}.safetensors"
    ask(client, name, "The")
    replace(path, (contexts / f"{other}.safetensors").read_bytes())
    answer = ask(client, name, "The")
    assert answer.json()["error"]["code"] == "internal_error"  # a damaged file: its header names another context
    assert ask(client, other, "The").status_code == 200
    well(client)


def test_another_server_has_taken_the_folder(
    make_client: Callable[..., TestClient], demo: GenerativeAdapter, contexts: Path
) -> None:
    """The folder was removed and a second server started on the new one: the first one writes nothing any more."""
    client = make_client()
    name = create(client, "The pet")
    shutil.rmtree(contexts)
    second = ContextStore(contexts, demo.base_fingerprint(), demo.generator_fingerprint())
    try:
        for answer in (client.post("/v1/contexts", json={}), client.post("/v1/contexts", json={"text": "The"})):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_error")
        assert append(client, name, "The pet").status_code == 404
        assert [path.name for path in contexts.iterdir()] == ["lock"]
    finally:
        second.close()
    well(client)


def test_two_servers_on_one_folder(client: TestClient, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--folder", str(tmp_path / "data")]) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert message == f"gakernels serve: folder {tmp_path / 'data' / 'contexts'} is in use by another process"
    well(client)


@pytest.mark.parametrize("now", [-1e9, 0.0, 1e9, 4e9, 1e12])
def test_the_clock_is_set(make_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    client, real = make_client(), time.time
    early = create(client, "The pet")
    before = text(ask(client, early, "Question"))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now)
        late = create(client, "The pet")
        assert append(client, early, "The job").status_code == 200
        well(client)
        assert client.get(f"/v1/contexts/{late}").json()["created"] == int(now)
        client = make_client()
        assert {one["id"] for one in client.get("/v1/contexts").json()["data"]} == {early, late}
        well(client)
    assert time.time is real
    client = make_client()
    assert text(ask(client, late, "Question")) == before
    assert client.get("/health").json()["damaged_contexts"] == 0


@pytest.mark.parametrize("form", ["peft", "adapter", "compact"])
def test_an_export_has_no_room(make_client: Callable[..., TestClient], form: str) -> None:
    client = make_client()
    name = create(client, "The pet")
    with files_of_at_most(1000):
        answer = client.get(f"/v1/contexts/{name}/export", params={"format": form})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_error")
    assert client.get(f"/v1/contexts/{name}/export", params={"format": form}).status_code == 200
