"""Requests made up from the server's own schema, right and wrong ones: never a 500, never a file outside its folder."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from gakernels.server.settings import ApiKeys, Limits

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")

KEY = "the-key-of-the-fuzzer"
TRAVERSING = (
    "../../../../../../etc/passwd",
    "..",
    "%2e%2e%2f%2e%2e%2fsecret",
    "..\\..\\secret",
    "/etc/passwd",
    "file:///etc/passwd",
    "ctx-" + "0" * 32 + "/../../secret",
    "ctx-" + "0" * 32 + ".safetensors",
    "\x00",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_watched: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    """Notes every file that the server's threads open for writing, and every one that they rename or remove."""
    if _watched is None or threading.current_thread() is threading.main_thread():
        return  # the main thread is the fuzzer's
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & _WRITING:
        _watched.append(arguments[0])
    elif event in ("os.remove", "os.rmdir"):
        folder = Path() if arguments[1] == -1 else Path(f"/proc/self/fd/{arguments[1]}").readlink()
        _watched.append(str(folder / arguments[0]))
    elif event in ("os.rename", "os.mkdir", "os.link", "os.symlink"):
        _watched.extend(str(argument) for argument in arguments[:2] if isinstance(argument, str | Path))


sys.addaudithook(_audit)


@contextmanager
def writes() -> Iterator[list[str]]:
    """Paths that this process writes to in the meantime."""
    global _watched
    _watched = found = []
    try:
        yield found
    finally:
        _watched = None


def fuzz(client: TestClient, examples: int, seed: int) -> dict[int, int]:
    """Send made-up requests to every operation; returns how often which status came."""
    statuses: dict[int, int] = {}
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    modes = list(schemathesis.GenerationMode)  # both what fits the schema and what does not

    for result in schema.get_all_operations():
        operation = result.ok()
        strategy = hypothesis.strategies.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=strategy)
        def one(case: schemathesis.Case) -> None:
            arguments = case.as_transport_kwargs(base_url="http://testserver")
            arguments["headers"] = {**arguments.get("headers", {}), "Authorization": f"Bearer {KEY}"}
            send = {name: value for name, value in arguments.items() if name in _KNOWN}
            response = client.request(content=arguments.get("data"), **send)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code < 500, (case, response.text)

        one()
    return statuses


_KNOWN = ("method", "url", "headers", "params", "json")


@pytest.fixture
def guarded(
    make_client: Callable[..., TestClient], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    """A server whose writes are watched; nothing beside its folder may be touched."""
    hypothesis.configuration.set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))
    secret = tmp_path / "secret"
    secret.write_text("nobody's")
    limits = Limits(contexts=20, append_tokens=200, new_tokens=8, body_bytes=20_000)
    client = make_client(keys=ApiKeys([KEY]), limits=limits)
    client.get("/openapi.json")
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "data")}
    with writes() as paths:
        made = client.post("/v1/contexts", json={"text": "The"}, headers={"Authorization": f"Bearer {KEY}"})
        assert made.status_code == 201
        assert paths
        yield client
    assert [path for path in paths if not Path(path).is_relative_to(tmp_path / "data")] == []
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "data")} == before
    assert secret.read_text() == "nobody's"


def test_no_made_up_request_is_an_error_of_the_server(guarded: TestClient, generator: torch.Generator) -> None:
    statuses = fuzz(guarded, examples=5, seed=generator.initial_seed())
    assert {200, 400, 404} <= set(statuses)
    assert sum(statuses.values()) >= 40


@pytest.mark.slow
def test_no_made_up_request_is_an_error_of_the_server_at_full_size(
    guarded: TestClient, generator: torch.Generator
) -> None:
    statuses = fuzz(guarded, examples=150, seed=generator.initial_seed())
    assert sum(statuses.values()) >= 1000


def test_paths_and_names_that_lead_elsewhere_lead_nowhere(guarded: TestClient, tmp_path: Path) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    contexts = sorted((tmp_path / "data" / "contexts").iterdir())
    for name in TRAVERSING:
        for method, path, body in (
            ("GET", f"/v1/contexts/{name}", None),
            ("DELETE", f"/v1/contexts/{name}", None),
            ("GET", f"/v1/contexts/{name}/export", None),
            ("POST", f"/v1/contexts/{name}", {"label": "The"}),
            ("POST", f"/v1/contexts/{name}/append", {"text": "The"}),
            ("POST", "/v1/contexts/compose", {"contexts": [name]}),
            ("POST", "/v1/completions", {"model": name, "prompt": "The"}),
            ("POST", "/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "The"}]}),
        ):
            url = path.replace("\x00", "%00")
            response = guarded.request(method, f"http://testserver{url}", json=body, headers=headers)
            assert response.status_code in (400, 404, 405), (method, path, response.text)
            assert "root:" not in response.text
    assert sorted((tmp_path / "data" / "contexts").iterdir()) == contexts


def test_a_label_or_text_is_never_a_path(guarded: TestClient) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for name in TRAVERSING:
        made = guarded.post("/v1/contexts", json={"label": name, "text": f"The {name}"}, headers=headers)
        assert made.status_code == 201, made.text
        assert made.json()["label"] == name
        assert guarded.get(f"/v1/contexts/{made.json()['id']}/export", headers=headers).status_code == 200
