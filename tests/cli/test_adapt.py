"""`gakernels adapt`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from invented import random_text
from tiny import same_adapters

from gakernels import Adapter, GenerativeAdapter


def test_it_writes_the_adapter_of_the_document(
    run: Callable[..., Any], files: Any, document: Path, tmp_path: Path
) -> None:
    outcome = run("adapt", *files.model, "--document", document, "--output", tmp_path / "a.safetensors")
    assert (outcome.code, outcome.err) == (0, "")
    model = GenerativeAdapter.from_pretrained(files.generator)
    adapter = model.stream().append(document.read_text()).adapter()
    assert same_adapters(Adapter.load(tmp_path / "a.safetensors"), adapter)
    assert outcome.out.startswith(f"{adapter.tokens_seen} tokens read in ")
    assert f"rank 4 for {len(adapter.lora_a)} layers ({adapter.numbers():,} numbers)" in outcome.out
    assert outcome.out.endswith(f"{tmp_path / 'a.safetensors'}\n")


def test_a_state_that_is_gone_on_with_equals_one_call(
    run: Callable[..., Any], files: Any, document: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second.txt"
    second.write_text(random_text(30))
    state, parts, whole = (tmp_path / f"{name}.safetensors" for name in ("state", "parts", "whole"))
    assert run("adapt", *files.model, "--document", document, "--state", state, "--output", parts).code == 0
    outcome = run("adapt", *files.model, "--document", second, "--state", state, "--output", parts)
    assert "30 tokens read" in outcome.out
    assert "after 41 of the saved state" in outcome.out
    outcome = run("adapt", *files.model, "--document", document, "--document", second, "--output", whole)
    assert "71 tokens read" in outcome.out
    assert same_adapters(Adapter.load(parts), Adapter.load(whole))


def test_the_order_of_the_documents_counts(run: Callable[..., Any], files: Any, document: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.txt"
    second.write_text(random_text(30))
    adapters = []
    for order in ([document, second], [second, document]):
        options = [part for path in order for part in ("--document", path)]
        assert run("adapt", *files.model, *options, "--output", tmp_path / "a.safetensors").code == 0
        adapters.append(Adapter.load(tmp_path / "a.safetensors"))
    assert adapters[0].tokens_seen == adapters[1].tokens_seen
    assert not same_adapters(*adapters)


def test_chunks_per_pass_bound_the_memory_only(
    run: Callable[..., Any], files: Any, document: Path, adapter: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    assert run("adapt", *files.model, "--document", document, "--chunks-per-pass", 1, "--output", other).code == 0
    one, two = Adapter.load(adapter), Adapter.load(other)
    for name in one.lora_a:
        assert (one.delta(name) - two.delta(name)).norm() < 1e-4 * one.delta(name).norm()


def test_a_base_model_in_another_place_can_be_named(
    run: Callable[..., Any], files: Any, document: Path, adapter: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in files.base.iterdir():
        (moved / file.name).symlink_to(file)
    other = tmp_path / "other.safetensors"
    assert run("adapt", *files.model, "--model", moved, "--document", document, "--output", other).code == 0
    one, two = Adapter.load(adapter), Adapter.load(other)
    assert all(one.lora_a[name].equal(two.lora_a[name]) for name in one.lora_a)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_base_model_can_be_in_half_precision(
    run: Callable[..., Any], files: Any, document: Path, adapter: Path, tmp_path: Path, dtype: str
) -> None:
    other = tmp_path / "other.safetensors"
    assert run("adapt", *files.model, "--dtype", dtype, "--document", document, "--output", other).code == 0
    one, two = Adapter.load(adapter), Adapter.load(other)
    assert two.base_fingerprint == one.base_fingerprint
    for name in one.lora_a:
        assert two.lora_a[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(one.delta(name).flatten(), two.delta(name).flatten(), 0) > 0.8


MISTAKES = {
    "missing": ("--document: there is no file {path}", None),
    "empty": ("--document: {path} is empty", b""),
    "blank": ("--document: {path} is empty", b" \n\t"),
    "nul": ("--document: {path} must be text, but it holds NUL bytes", b"w3 \0"),
    "binary": ("--document: {path} must be UTF-8 text, but it can't be read as such", b"\x80\x81\xfe\xff"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_document_that_is_no_text_is_named(
    refused: Callable[..., str], files: Any, document: Path, tmp_path: Path, name: str
) -> None:
    message, content = MISTAKES[name]
    path = tmp_path / f"{name}.txt"
    if content is not None:
        path.write_bytes(content)
    output = tmp_path / "a.safetensors"
    line = refused("adapt", *files.model, "--document", document, "--document", path, "--output", output)
    assert message.format(path=path) in line
    assert not output.exists()


def test_a_folder_is_no_document(refused: Callable[..., str], files: Any, tmp_path: Path) -> None:
    line = refused("adapt", *files.model, "--document", tmp_path, "--output", tmp_path / "a.safetensors")
    assert f"--document: there is no file {tmp_path}" in line


def test_an_output_that_is_a_folder_is_named(
    refused: Callable[..., str], files: Any, document: Path, tmp_path: Path
) -> None:
    line = refused("adapt", *files.model, "--document", document, "--output", tmp_path)
    assert f"{tmp_path} is a folder" in line


def test_adapter_and_state_need_files_of_their_own(
    refused: Callable[..., str], files: Any, document: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    line = refused("adapt", *files.model, "--document", document, "--output", path, "--state", path)
    assert "--output and --state must be different files" in line
    assert not path.exists()


def test_a_state_of_another_generator_is_refused(
    run: Callable[..., Any], refused: Callable[..., str], files: Any, document: Path, tmp_path: Path
) -> None:
    options = ["--document", document, "--state", tmp_path / "state", "--output", tmp_path / "a"]
    assert run("adapt", "--generator", files.other_generator, *options).code == 0
    before = (tmp_path / "state").read_bytes()
    assert "was made with a base with fingerprint" in refused("adapt", *files.model, *options)
    assert (tmp_path / "state").read_bytes() == before


def test_an_adapter_is_no_state(
    refused: Callable[..., str], files: Any, document: Path, adapter: Path, tmp_path: Path
) -> None:
    line = refused("adapt", *files.model, "--document", document, "--state", adapter, "--output", tmp_path / "b")
    assert f"{adapter} must be a state file, but it is a adapter file" in line


@pytest.mark.parametrize("count", [0, -3])
def test_chunks_per_pass_must_be_positive(
    refused: Callable[..., str], files: Any, document: Path, tmp_path: Path, count: int
) -> None:
    line = refused(
        "adapt", *files.model, "--document", document, "--output", tmp_path / "a", "--chunks-per-pass", count
    )
    assert f"must be at least 1, but it is {count}" in line
