"""Servers with the models of the package."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import demo_users
import pytest
from starlette.testclient import TestClient

from gakernels import GenerativeAdapter
from gakernels.cli.serve import DEMO_CHAT_TEMPLATE
from gakernels.server.server import assemble, create_app
from gakernels.server.settings import Settings

demo, make_users = demo_users.demo, demo_users.make_users


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
