"""A server that is killed in the middle of appends: what was acknowledged is there, bit by bit."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import httpx2
import pytest
import torch
from loopback import ServerProcess

from gakernels import CompactAdapter, GenerativeAdapter
from gakernels.data.people import draw_document

WRITERS = 4


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], ServerProcess]]:
    with ExitStack() as stack:

        def start() -> ServerProcess:
            server = ServerProcess(tmp_path / "data")
            stack.callback(server.kill)
            return server

        yield start


def statements(seed: int) -> list[str]:
    random = Random(seed)
    return [f"{part}. " for _ in range(40) for part in draw_document(random).text().split(". ")]


class Writer(threading.Thread):
    """Appends one text after the other to a context of its own, until the server is gone."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        super().__init__()
        self.client, self.texts = server.client(), statements(seed)
        self.context = self.client.post("/v1/contexts", json={}).json()["id"]
        self.acknowledged = 0
        self.errors: list[str] = []

    def run(self) -> None:
        try:
            for number, text in enumerate(self.texts):
                body = {"text": text, "revision": number}
                response = self.client.post(f"/v1/contexts/{self.context}/append", json=body)
                if response.status_code != 200 or response.json()["revision"] != number + 1:
                    self.errors.append(response.text)
                self.acknowledged = number + 1
        except httpx2.HTTPError:
            pass  # killed


def check(writer: Writer, client: httpx2.Client, demo: GenerativeAdapter, folder: Path) -> None:
    """The context holds what was acknowledged, and is what a stream of the same texts is."""
    assert writer.errors == []
    info = client.get(f"/v1/contexts/{writer.context}").json()
    # The last append may have been written when the answer was not out yet.
    assert info["revision"] in (writer.acknowledged, writer.acknowledged + 1)
    stream = demo.stream()
    for text in writer.texts[: info["revision"]]:
        stream.append(text)
    assert info["tokens_seen"] == stream.tokens_seen
    path = folder / "exported"
    path.write_bytes(client.get(f"/v1/contexts/{writer.context}/export?format=compact").content)
    found, expected = CompactAdapter.load(path), stream.compact()
    for name in demo.adapted_names:
        assert torch.equal(found.left[name], expected.left[name])
        assert torch.equal(found.right[name], expected.right[name])
    more = {"text": writer.texts[info["revision"]], "revision": info["revision"]}
    assert client.post(f"/v1/contexts/{writer.context}/append", json=more).status_code == 200


def kill_in_the_middle(server: ServerProcess, seed: int, appends: int) -> list[Writer]:
    """Writers append at the same time until each has so many acknowledged, then the server is killed."""
    writers = [Writer(server, seed + number) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    while min(writer.acknowledged for writer in writers) < appends:
        time.sleep(0.005)
    server.kill()
    for writer in writers:
        writer.join()
    return writers


def test_nothing_acknowledged_is_lost_and_adapters_are_the_same_bit_by_bit(
    start: Callable[[], ServerProcess], demo: GenerativeAdapter, tmp_path: Path, generator: torch.Generator
) -> None:
    writers = kill_in_the_middle(start(), generator.initial_seed() % 2**32, appends=3)
    client = start().client()
    assert len(client.get("/v1/contexts").json()["data"]) == WRITERS
    for writer in writers:
        check(writer, client, demo, tmp_path)
    assert client.get("/health").json()["damaged_contexts"] == 0
    assert not list((tmp_path / "data" / "contexts").glob(".*"))


@pytest.mark.slow
def test_nothing_is_lost_however_often_it_is_killed(
    start: Callable[[], ServerProcess], demo: GenerativeAdapter, tmp_path: Path, generator: torch.Generator
) -> None:
    random, writers = Random(generator.initial_seed()), []
    for _ in range(6):
        writers.append(kill_in_the_middle(start(), random.randrange(2**32), random.randrange(1, 9)))
    client = start().client()
    for writer in (writer for several in writers for writer in several):
        check(writer, client, demo, tmp_path)
    assert client.get("/health").json() == {
        "status": "ok",
        "model": "gakernels-demo",
        "contexts": 6 * WRITERS,
        "damaged_contexts": 0,
    }
