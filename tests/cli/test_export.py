"""`gakernels export`, read by PEFT, transformers and the gguf package."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import logits_of, random_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from gakernels import Adapter, GenerativeAdapter


@pytest.fixture
def ids() -> torch.Tensor:
    return random_ids(3, 9)


@pytest.fixture
def expected(files: Any, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits with the adapter, in this library."""
    model = GenerativeAdapter.from_pretrained(files.generator)
    plain = logits_of(model.base, ids)
    with model.adapted(Adapter.load(adapter)):
        logits = logits_of(model.base, ids)
    assert (logits - plain).abs().max() > 1e-3 * plain.abs().max()
    return logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-5 * expected.abs().max())


def test_peft_computes_the_same(
    run: Callable[..., Any], adapter: Path, ids: torch.Tensor, expected: torch.Tensor, files: Any, tmp_path: Path
) -> None:
    outcome = run("export", "--adapter", adapter, "--output", tmp_path / "lora")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"peft folder written: {tmp_path / 'lora'}\n"
    base = AutoModelForCausalLM.from_pretrained(files.base)
    assert close(logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "lora"), ids), expected)


def test_transformers_computes_the_same_from_the_merged_model(
    run: Callable[..., Any], adapter: Path, ids: torch.Tensor, expected: torch.Tensor, files: Any, tmp_path: Path
) -> None:
    outcome = run("export", "--adapter", adapter, "--format", "merged", *files.model, "--output", tmp_path / "model")
    assert (outcome.code, outcome.err) == (0, "")
    assert close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), ids), expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("w3 w9")["input_ids"] == AutoTokenizer.from_pretrained(files.base)("w3 w9")["input_ids"]


def test_merging_can_be_in_half_precision(run: Callable[..., Any], adapter: Path, files: Any, tmp_path: Path) -> None:
    options = ["--format", "merged", *files.model, "--dtype", "bfloat16"]
    assert run("export", "--adapter", adapter, *options, "--output", tmp_path / "model").code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.bfloat16


def test_merging_needs_the_generator(refused: Callable[..., str], adapter: Path, tmp_path: Path) -> None:
    line = refused("export", "--adapter", adapter, "--format", "merged", "--output", tmp_path / "model")
    assert "--format merged needs --generator" in line


def test_for_vllm_the_rank_is_one_that_it_takes(run: Callable[..., Any], adapter: Path, tmp_path: Path) -> None:
    outcome = run("export", "--adapter", adapter, "--format", "vllm", "--output", tmp_path / "lora")
    assert (outcome.code, outcome.err, outcome.out) == (0, "", f"vllm folder written: {tmp_path / 'lora'}\n")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 8


def test_a_gguf_file_is_written(run: Callable[..., Any], adapter: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for _ in range(2):  # the second time the file is there
        outcome = run("export", "--adapter", adapter, "--format", "gguf", "--output", tmp_path / "lora.gguf")
        assert (outcome.code, outcome.err, outcome.out) == (0, "", f"gguf file written: {tmp_path / 'lora.gguf'}\n")
    tensors = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    assert len(tensors) == 2 * len(Adapter.load(adapter).lora_a)


def test_a_gguf_file_is_not_written_over_a_folder(refused: Callable[..., str], adapter: Path, tmp_path: Path) -> None:
    line = refused("export", "--adapter", adapter, "--format", "gguf", "--output", tmp_path)
    assert f"--output must be a file, but {tmp_path} is a folder" in line


@pytest.mark.parametrize("kind", ["peft", "merged", "vllm"])
def test_an_output_that_is_a_file_is_left_alone(
    refused: Callable[..., str], files: Any, adapter: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "taken").write_text("mine")
    line = refused("export", "--adapter", adapter, "--format", kind, *files.model, "--output", tmp_path / "taken")
    assert "--output must be a folder, but" in line
    assert (tmp_path / "taken").read_text() == "mine"


def test_other_files_in_the_folder_stay(run: Callable[..., Any], adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "README.md").write_text("mine")
    for _ in range(2):
        assert run("export", "--adapter", adapter, "--output", tmp_path / "lora").code == 0
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_an_adapter_of_another_base_is_not_merged(
    refused: Callable[..., str], adapter: Path, files: Any, tmp_path: Path
) -> None:
    options = ["--format", "merged", "--generator", files.other_generator]
    line = refused("export", "--adapter", adapter, *options, "--output", tmp_path / "model")
    assert "adapter belongs to a base model with fingerprint" in line
    assert not (tmp_path / "model").exists()


def test_a_damaged_adapter_is_named(refused: Callable[..., str], adapter: Path, tmp_path: Path) -> None:
    adapter.write_bytes(adapter.read_bytes()[:-10])
    assert f"{adapter} is damaged" in refused("export", "--adapter", adapter, "--output", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
