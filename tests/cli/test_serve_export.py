"""`gakernels serve-export`: what it writes, and the commands, by the rules in vLLM's and llama.cpp's sources."""

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gakernels import Adapter
from gakernels.adapters.peft_export import VLLM_RANKS


@pytest.fixture
def adapters(adapter: Path, tmp_path: Path) -> list[Path]:
    """Two files for one base model."""
    paths = [tmp_path / "first.safetensors", tmp_path / "second-1.safetensors"]
    for path in paths:
        path.write_bytes(adapter.read_bytes())
    return paths


def printed_command(out: str) -> list[str]:
    """The command that starts the server, as a shell splits it."""
    return shlex.split(out.split("\n\n")[1].replace("\\\n", ""))


def test_vllm(run: Callable[..., Any], adapters: list[Path], tmp_path: Path) -> None:
    outcome = run("serve-export", *adapters, "--model", "owner/base", "--output", tmp_path / "lo ra")
    assert (outcome.code, outcome.err) == (0, "")
    parser = argparse.ArgumentParser()  # as vLLM declares these options
    parser.add_argument("model")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int, choices=VLLM_RANKS)
    parser.add_argument("--lora-modules", nargs="+")
    program, verb, *arguments = printed_command(outcome.out)
    options = parser.parse_args(arguments)
    assert (program, verb, options.model, options.enable_lora) == ("vllm", "serve", "owner/base", True)
    modules = dict(item.split("=") for item in options.lora_modules)
    assert modules == {name: str(tmp_path / "lo ra" / name) for name in ("first", "second-1")}
    for folder in modules.values():
        assert json.loads((Path(folder) / "adapter_config.json").read_text())["r"] <= options.max_lora_rank
    assert '{"model": "second-1", "prompt": ...}' in outcome.out


def test_llama_cpp(run: Callable[..., Any], adapters: list[Path], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    options = ["--engine", "llama.cpp", "--model", "base.gguf"]
    outcome = run("serve-export", *adapters, *options, "--output", tmp_path / "lora")
    assert (outcome.code, outcome.err) == (0, "")
    program, *arguments = printed_command(outcome.out)
    files = [tmp_path / "lora" / f"{path.stem}.gguf" for path in adapters]
    flags = [part for file in files for part in ("--lora", str(file))]
    assert (program, arguments) == ("llama-server", ["--model", "base.gguf", "--lora-init-without-apply", *flags])
    for file in files:
        assert len(gguf.GGUFReader(file).tensors) == 2 * len(Adapter.load(adapters[0]).lora_a)
    assert '{"lora": [{"id": 1, "scale": 1.0}], "prompt": ...}  # second-1' in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "a,b"], "--output must be a path without , and ="),
        (["--output", "lora", "--model", "base.gguf"], "--model must name a folder or hub name of the base model"),
        (["--output", "lora", "--engine", "llama.cpp"], "--model must name a GGUF file of the base model"),
    ],
)
def test_what_no_server_would_load(
    refused: Callable[..., str], adapter: Path, options: list[str], message: str, tmp_path: Path
) -> None:
    assert message in refused("serve-export", adapter, *options)
    assert not (tmp_path / "lora").exists()


def test_adapters_that_do_not_go_together(
    run: Callable[..., Any], refused: Callable[..., str], adapter: Path, files: Any, tmp_path: Path
) -> None:
    assert "different names" in refused("serve-export", adapter, adapter, "--output", tmp_path / "lora")
    (tmp_path / "an adapter.safetensors").write_bytes(adapter.read_bytes())
    line = refused("serve-export", tmp_path / "an adapter.safetensors", "--output", tmp_path / "lora")
    assert "ADAPTER must be a file named with letters" in line
    (tmp_path / "text").write_text("w1 w2 w3")
    made = ["--document", tmp_path / "text", "--output", tmp_path / "other.safetensors"]
    assert run("adapt", "--generator", files.other_generator, *made).code == 0
    line = refused("serve-export", adapter, tmp_path / "other.safetensors", "--output", tmp_path / "lora")
    assert "ADAPTER must be files for one base model" in line
    assert not (tmp_path / "lora").exists()
