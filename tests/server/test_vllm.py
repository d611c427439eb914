"""The bridge to vLLM, against a stub that keeps to what vLLM documents: the two calls, their refusals, and streams."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from demo_users import User
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from peft import PeftConfig
from safetensors.torch import load_file
from starlette.testclient import TestClient

from gakernels import GenerativeAdapter
from gakernels.server import server as server_module
from gakernels.server.context_store import text_identifier
from gakernels.server.server import assemble, create_app
from gakernels.server.settings import Settings
from gakernels.server.vllm import VllmClient

BASE = "my-base"


class VllmStub:
    """Answers with the name of the adapter; loads adapters as vLLM does, by reading them from their folder."""

    def __init__(self) -> None:
        self.loaded: dict[str, dict[str, torch.Tensor]] = {}
        self.calls: list[str] = []
        self.bodies: list[dict] = []
        self.authorization: set[str | None] = set()
        self.down = False
        self.app = FastAPI()
        self.app.add_api_route("/v1/load_lora_adapter", self.load, methods=["POST"], response_model=None)
        self.app.add_api_route("/v1/unload_lora_adapter", self.unload, methods=["POST"], response_model=None)
        for path in ("/v1/completions", "/v1/chat/completions"):
            self.app.add_api_route(path, self.complete, methods=["POST"], response_model=None)

    async def load(self, request: Request) -> Response:
        body = await request.json()
        self.authorization.add(request.headers.get("authorization"))
        name, folder = body["lora_name"], Path(body["lora_path"])
        self.calls.append(f"load {name}")
        if name in self.loaded:
            return self.error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not (folder / "adapter_config.json").is_file():
            return self.error(404, f"No adapter found for {folder}", "NotFoundError")
        config = PeftConfig.from_pretrained(str(folder))
        assert config.r in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        self.loaded[name] = load_file(folder / "adapter_model.safetensors")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        self.calls.append(f"unload {name}")
        if self.loaded.pop(name, None) is None:
            return self.error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.down:
            return self.error(500, "out of memory", "InternalServerError")
        if body["model"] != BASE and body["model"] not in self.loaded:
            return self.error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        if body.get("max_tokens", 1) > 1000:
            return self.error(400, "max_tokens is too large", "BadRequestError")
        answer = {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [{"text": "yes"}]}
        answer["usage"] = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
        if not body.get("stream"):
            return JSONResponse(answer)

        async def events() -> AsyncIterator[str]:
            for _ in range(3):
                yield f"data: {json.dumps(answer)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @staticmethod
    def error(status: int, message: str, kind: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


@pytest.fixture
def vllm() -> VllmStub:
    return VllmStub()


@pytest.fixture
def bridged(demo: GenerativeAdapter, vllm: VllmStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A server that decodes by the stub, two adapters at a time; not started yet."""

    def connected(url: str, key: str | None) -> VllmClient:
        return VllmClient(url, key, httpx2.ASGITransport(app=vllm.app))

    monkeypatch.setattr(server_module, "VllmClient", connected)
    settings = Settings(
        tmp_path / "data", BASE, threads=1, vllm_url="http://vllm/", vllm_key="its-key", vllm_adapters=2
    )
    return TestClient(create_app(assemble(demo, settings)))


@pytest.fixture
def client(bridged: TestClient) -> Iterator[TestClient]:
    """The same, running."""
    with bridged:
        yield bridged


def context(client: TestClient, text: str = "The pet of Toso Zelwin is grey hamster.") -> str:
    return str(client.post("/v1/contexts", json={"text": text}).json()["id"])


def ask(client: TestClient, name: str, **values: object) -> httpx2.Response:
    return client.post("/v1/completions", json={"model": name, "prompt": "The pet", "max_tokens": 5, **values})


def test_an_adapter_is_made_here_and_registered_there(
    client: TestClient, vllm: VllmStub, demo: GenerativeAdapter, make_users: object
) -> None:
    user: User = make_users(1)[0]  # type: ignore[operator]
    name = context(client, user.document.text())
    answer = ask(client, name, temperature=0, stop=["."], user="somebody").json()
    assert (answer["model"], answer["choices"]) == (name, [{"text": "yes"}])
    assert vllm.calls == [f"load {name}-1"]
    assert vllm.authorization == {"Bearer its-key"}
    body = {"model": f"{name}-1", "prompt": "The pet", "max_tokens": 5, "temperature": 0, "stop": ["."]}
    assert vllm.bodies == [body]  # what was asked for, and nothing that was not
    adapter = demo.expand(user.adapter)
    for layer in demo.adapted_names:
        factors = [vllm.loaded[f"{name}-1"][f"base_model.model.{layer}.lora_{half}.weight"] for half in "BA"]
        assert (factors[0] @ factors[1] - adapter.delta(layer)).abs().max() < 1e-5
    ask(client, name)
    assert vllm.calls == [f"load {name}-1"]


def test_special_tokens_end_an_answer_of_vllm_by_their_ids(client: TestClient, vllm: VllmStub) -> None:
    ask(client, BASE, stop=["<eos>", "."], stop_token_ids=[9])
    assert (vllm.bodies[-1]["stop"], vllm.bodies[-1]["stop_token_ids"]) == (["<eos>", "."], [9, 2])
    ask(client, BASE, stop="<bos>", skip_special_tokens=False)
    assert (vllm.bodies[-1]["stop_token_ids"], vllm.bodies[-1]["skip_special_tokens"]) == ([1], False)
    ask(client, BASE, stop=".", temperature=None, logit_bias=None)
    assert {"stop_token_ids", "temperature", "logit_bias"}.isdisjoint(vllm.bodies[-1])
    turns = [{"role": "developer", "content": "be short"}, {"role": "assistant", "content": "yes", "refusal": None}]
    client.post("/v1/chat/completions", json={"model": BASE, "messages": turns})
    plain = [{"role": "system", "content": "be short"}, {"role": "assistant", "content": "yes"}]
    assert vllm.bodies[-1]["messages"] == plain


def test_what_openai_has_is_passed_on_and_what_changes_nothing_is_not(client: TestClient, vllm: VllmStub) -> None:
    sampling = {
        "n": 2,
        "seed": -1,
        "top_p": 0.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -1.0,
        "logit_bias": {"5": 1.0},
    }
    idle = {"user": "a", "store": True, "metadata": {}, "service_tier": "auto"}
    assert ask(client, BASE, logprobs=2, echo=True, best_of=2, suffix="", **sampling, **idle).status_code == 200
    body = {"model": BASE, "prompt": "The pet", "max_tokens": 5, "logprobs": 2, "echo": True}
    assert vllm.bodies[-1] == {**body, **sampling}
    turns = [{"role": "user", "content": "Who?", "name": "Toso"}]
    asked = {"model": BASE, "messages": turns, "logprobs": True, "top_logprobs": 3, **sampling}
    more = {"tools": [], "response_format": {"type": "text"}, "reasoning_effort": "low", "parallel_tool_calls": False}
    assert client.post("/v1/chat/completions", json={**asked, **idle, **more}).status_code == 200
    assert vllm.bodies[-1] == asked
    refusal = client.post("/v1/chat/completions", json={**asked, "tools": [{"type": "function"}]})
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize("stream", [False, True])
def test_a_context_in_the_request_is_read_here(client: TestClient, vllm: VllmStub, stream: bool) -> None:
    text = "The pet of Toso Zelwin is grey hamster."
    name = f"{text_identifier('', [text])}-1"
    for cached in (False, True):
        answer = ask(client, BASE, context=text, stream=stream)
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        found = json.loads(events[-2 if stream else 0])
        assert found["model"] == BASE
        assert found["usage"]["context_cached"] is cached
        assert found["usage"]["context_tokens"] > 5
        assert found["usage"]["total_tokens"] == 3  # vLLM's own
        assert vllm.bodies[-1]["model"] == name
        assert "context" not in vllm.bodies[-1]
    assert vllm.calls == [f"load {name}"]


def test_the_base_model_and_an_empty_context_need_no_adapter(client: TestClient, vllm: VllmStub) -> None:
    assert ask(client, BASE).json()["model"] == BASE
    empty = client.post("/v1/contexts", json={}).json()["id"]
    assert ask(client, empty).json()["model"] == empty
    assert vllm.calls == []
    assert [body["model"] for body in vllm.bodies] == [BASE, BASE]


def test_each_revision_has_a_name_of_its_own_and_the_old_one_is_taken_back(
    client: TestClient, vllm: VllmStub, tmp_path: Path
) -> None:
    name = context(client)
    ask(client, name)
    client.post(f"/v1/contexts/{name}/append", json={"text": "The job of Toso Zelwin is kite mender."})
    ask(client, name)
    assert vllm.calls == [f"load {name}-1", f"load {name}-2", f"unload {name}-1"]
    assert [path.name for path in (tmp_path / "data" / "peft").iterdir()] == [f"{name}-2"]
    client.delete(f"/v1/contexts/{name}")
    assert vllm.loaded == {}
    assert list((tmp_path / "data" / "peft").iterdir()) == []


def test_the_least_recently_used_adapter_is_taken_back(client: TestClient, vllm: VllmStub) -> None:
    names = [context(client) for _ in range(3)]
    for number in (0, 1, 0, 2):
        ask(client, names[number])
    assert list(vllm.loaded) == [f"{names[0]}-1", f"{names[2]}-1"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_passes_through_with_the_names_of_here(client: TestClient, vllm: VllmStub, path: str) -> None:
    name = context(client)
    what = {"prompt": "The"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Who?"}]}
    response = client.post(path, json={"model": name, "stream": True, **what})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    assert [json.loads(line)["model"] for line in lines] == [name] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_vllm_that_was_started_anew_gets_the_adapter_again(client: TestClient, vllm: VllmStub, stream: bool) -> None:
    name = context(client)
    ask(client, name)
    vllm.loaded.clear()
    response = ask(client, name, stream=stream)
    assert response.status_code == 200
    assert "yes" in response.text
    assert vllm.calls == [f"load {name}-1"] * 2


def test_an_adapter_that_is_there_already_is_used(client: TestClient, vllm: VllmStub) -> None:
    name = context(client)
    vllm.loaded[f"{name}-1"] = {}  # this server was started anew, vLLM was not
    assert ask(client, name).status_code == 200


def test_vllm_is_tidied_up_at_the_end(bridged: TestClient, vllm: VllmStub, tmp_path: Path) -> None:
    with bridged:
        for name in [context(bridged) for _ in range(2)]:
            ask(bridged, name)
        assert len(vllm.loaded) == 2
    assert vllm.loaded == {}
    assert not (tmp_path / "data" / "peft").exists()


def test_refusals_and_failures_are_told(client: TestClient, vllm: VllmStub) -> None:
    name = context(client)
    response = ask(client, name, max_tokens=2000)
    assert response.status_code == 400
    assert "max_tokens is too large" in response.json()["error"]["message"]
    vllm.down = True
    response = ask(client, name)
    assert response.status_code == 502
    assert "out of memory" in response.json()["error"]["message"]
    streamed = ask(client, name, stream=True)
    assert json.loads(streamed.text.removeprefix("data: "))["error"]["code"] == "engine_error"


@pytest.mark.parametrize("stream", [False, True])
def test_vllm_is_told_when_a_client_hangs_up(bridged: TestClient, vllm: VllmStub, stream: bool) -> None:
    ended = []

    async def hang_up() -> None:
        asked, content = asyncio.Event(), json.dumps({"model": BASE, "prompt": "The", "stream": stream}).encode()
        sent = iter([{"type": "http.request", "body": content}])

        async def receive() -> dict[str, Any]:
            for message in sent:
                return message
            await asyncio.wait_for(asked.wait(), 30)
            return {"type": "http.disconnect"}

        async def send(_: object) -> None:
            pass

        async def endless(_: Request) -> None:
            asked.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(True)

        vllm.app.router.routes.clear()
        vllm.app.add_api_route("/v1/completions", endless, methods=["POST"], response_model=None)
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        await asyncio.wait_for(bridged.app(scope, receive, send), 30)

    asyncio.run(hang_up())
    assert ended == [True]


def test_a_vllm_that_is_not_there_is_told(demo: GenerativeAdapter, tmp_path: Path) -> None:
    settings = Settings(tmp_path / "data", BASE, threads=1, vllm_url="http://127.0.0.1:9")
    with TestClient(create_app(assemble(demo, settings))) as client:
        response = ask(client, context(client))
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "engine_unreachable"
        assert ask(client, BASE).status_code == 502
