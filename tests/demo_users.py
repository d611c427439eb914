"""The models of the package, and users who each have a document of their own: for the conftest of a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from random import Random

import pytest
import torch

from gakernels import CompactAdapter, GenerativeAdapter
from gakernels.data.people import Document, draw_document


@dataclass(frozen=True)
class User:
    """Somebody with a document, its compact adapter, and a question about it with the right answer."""

    document: Document
    adapter: CompactAdapter
    question: str
    answer: str


@pytest.fixture(scope="session")
def demo() -> GenerativeAdapter:
    """The base model and generator of the package; no test changes them."""
    return GenerativeAdapter.from_pretrained(str(files("gakernels.demo") / "assets" / "generator")).eval()


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
