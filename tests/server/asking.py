"""Requests to a server, and what their answers must be."""

import json
from typing import Any

from demo_users import User
from starlette.testclient import TestClient

GREEDY = {"temperature": 0, "max_tokens": 6}


def create(client: TestClient, user: User, **options: Any) -> str:
    response = client.post("/v1/contexts", json={"text": user.document.text()}, **options)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def complete(client: TestClient, model: str, prompt: object, /, **values: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": model, "prompt": prompt, **GREEDY, **values})
    assert response.status_code == 200, response.text
    return dict(response.json())


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def refused(response: Any, status: int, word: str = "") -> None:
    """The OpenAI form of an error, with a message that helps."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"]
