"""The models of the package, and users who each have a document of their own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from demo_users import User
from starlette.testclient import TestClient

from gakernels import GenerativeAdapter
from gakernels.cli.serve import DEMO_CHAT_TEMPLATE
from gakernels.data.people import draw_document
from gakernels.server.server import assemble, create_app
from gakernels.server.settings import Settings


@pytest.fixture(autouse=True)
def seed(generator: torch.Generator) -> None:
    """Random models and inputs are drawn from the global generator; it starts with the seed of this test."""
    torch.manual_seed(generator.initial_seed())


@pytest.fixture(scope="session")
def demo() -> GenerativeAdapter:
    """The base model and generator of the package; no test changes them."""
    return GenerativeAdapter.from_pretrained(str(files("gakernels.demo") / "assets" / "generator")).eval()


@pytest.fixture
def make_client(demo: GenerativeAdapter, tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """Starts a server in this process, on the folder `data`; the server before it ends first."""
    stack = ExitStack()

    def make(**settings: Any) -> TestClient:
        stack.close()
        chosen = {"cpu_mebibytes": 64, "disk_mebibytes": 64, "threads": 1, "chat_template": DEMO_CHAT_TEMPLATE}
        parts = assemble(demo, Settings(tmp_path / "data", "demo", **{**chosen, **settings}))
        return stack.enter_context(TestClient(create_app(parts), raise_server_exceptions=False))

    with stack:
        yield make


@pytest.fixture
def client(make_client: Callable[..., TestClient]) -> TestClient:
    """A server with default settings and without keys."""
    return make_client()


@pytest.fixture
def make_users(demo: GenerativeAdapter, generator: torch.Generator) -> Callable[[int], list[User]]:
    """Draws so many users with documents that no model has seen."""
    random = Random(generator.initial_seed())

    def make(count: int) -> list[User]:
        users = []
        for document in (draw_document(random, 1, (15, 18), "test") for _ in range(count)):
            question, answer = random.choice(document.questions())
            users.append(User(document, demo.stream().append(document.text()).compact(), question, answer))
        return users

    return make
