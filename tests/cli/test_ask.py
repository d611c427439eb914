"""`gakernels ask`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gakernels import Adapter, GenerativeAdapter

PROMPTS = ["w3 w4 w5", "w9", "w6 w7"]


@pytest.fixture
def model(files: Any) -> GenerativeAdapter:
    return GenerativeAdapter.from_pretrained(files.generator)


def test_an_adapter_is_used(run: Callable[..., Any], files: Any, model: GenerativeAdapter, adapter: Path) -> None:
    outcome = run("ask", *files.model, "--adapter", adapter, *PROMPTS)
    with model.adapted(Adapter.load(adapter)):
        assert outcome.out == "".join(text + "\n" for text in model.generate(PROMPTS))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out != run("ask", *files.model, "--no-adapter", *PROMPTS).out


def test_a_document_is_read_now(run: Callable[..., Any], files: Any, document: Path, adapter: Path) -> None:
    outcome = run("ask", *files.model, "--document", document, *PROMPTS)
    assert outcome.out == run("ask", *files.model, "--adapter", adapter, *PROMPTS).out
    assert outcome.code == 0


def test_no_adapter_is_the_base_model(run: Callable[..., Any], files: Any, model: GenerativeAdapter) -> None:
    outcome = run("ask", *files.model, "--no-adapter", "--max-new-tokens", 5, *PROMPTS)
    expected = model.generate(PROMPTS, max_new_tokens=5)
    assert outcome.out.splitlines() == expected
    assert all(len(text.split()) <= 5 for text in expected)


@pytest.mark.parametrize("chosen", [[], ["adapter", "document"], ["adapter", "none"], ["document", "none"]])
def test_exactly_one_of_the_three_must_be_chosen(
    refused: Callable[..., str], files: Any, document: Path, adapter: Path, chosen: list[str]
) -> None:
    options = {"adapter": ["--adapter", adapter], "document": ["--document", document], "none": ["--no-adapter"]}
    line = refused("ask", *files.model, *[part for name in chosen for part in options[name]], "w3")
    assert "give exactly one of --adapter, --document and --no-adapter" in line


@pytest.mark.parametrize("count", [0, -1])
def test_no_new_tokens_are_a_mistake(refused: Callable[..., str], files: Any, count: int) -> None:
    line = refused("ask", *files.model, "--no-adapter", "--max-new-tokens", count, "w3")
    assert f"--max-new-tokens must be at least 1, but it is {count}" in line


def test_an_adapter_of_another_base_is_refused(
    run: Callable[..., Any], refused: Callable[..., str], files: Any, document: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    assert run("adapt", "--generator", files.other_generator, "--document", document, "--output", other).code == 0
    line = refused("ask", *files.model, "--adapter", other, "w3")
    assert "adapter belongs to a base model with fingerprint" in line
    assert str(files.other_base) in line


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "flipped"])
def test_a_damaged_adapter_is_named(refused: Callable[..., str], files: Any, adapter: Path, damage: str) -> None:
    data = adapter.read_bytes()
    changed = {"empty": b"", "cut": data[: len(data) // 2], "text": b"w3", "flipped": data[:-1] + bytes([data[-1] ^ 1])}
    adapter.unlink()
    if damage != "missing":
        adapter.write_bytes(changed[damage])
    line = refused("ask", *files.model, "--adapter", adapter, "w3")
    assert str(adapter) in line
    assert ("there is no file" if damage == "missing" else "damaged") in line
