"""What all commands have in common: help, exit codes, and mistakes in naming models."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from limits import files_of_at_most

from gakernels import __version__

COMMANDS = ("demo", "adapt", "ask", "pretrain", "export", "data", "reproduce", "info")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_an_example(run: Callable[..., Any], command: str) -> None:
    outcome = run(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"gakernels {command}" in outcome.out.split("\nexample:\n")[1]


def test_the_help_lists_all_commands(run: Callable[..., Any]) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    assert all(f"\n    {command} " in outcome.out for command in COMMANDS)


def test_the_version(run: Callable[..., Any]) -> None:
    assert run("--version").out == f"gakernels {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["adopt"], ["info", "--loud"], ["ask"], ["export", "--format", "gguf"]])
def test_a_wrong_call_is_told_in_one_line(run: Callable[..., Any], arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("gakernels")
    assert "--help" in outcome.err


def test_python_can_run_the_package_and_gives_the_exit_code() -> None:
    script = [sys.executable, "-m", "gakernels", "ask", "--generator", "nowhere", "--no-adapter", "w3"]
    process = subprocess.run(script, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("gakernels ask: --generator must be a folder with a generator.safetensors")
    assert process.stderr.count("\n") == 1


@pytest.fixture
def broken(files: Any, tmp_path: Path) -> Path:
    """A copy of the generator to break."""
    return Path(shutil.copytree(files.generator, tmp_path / "generator"))


def ask(refused: Callable[..., str], *options: object) -> str:
    return refused("ask", "--no-adapter", "w3", *options)


def test_a_folder_without_a_generator_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        line = ask(refused, "--generator", path)
        assert f"--generator must be a folder with a generator.safetensors, but {path} has none" in line


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped"])
def test_a_damaged_generator_is_named(refused: Callable[..., str], broken: Path, damage: str) -> None:
    path = broken / "generator.safetensors"
    data = path.read_bytes()
    changed = {"empty": b"", "cut": data[: len(data) // 2], "text": b"w3", "flipped": data[:-1] + bytes([data[-1] ^ 1])}
    path.write_bytes(changed[damage])
    assert f"{path} is damaged" in ask(refused, "--generator", broken)


def test_a_base_of_other_numbers_is_refused(refused: Callable[..., str], files: Any) -> None:
    line = ask(refused, *files.model, "--model", files.other_base)
    assert "base must be the model that" in line
    assert "but its fingerprint is" in line


def test_a_missing_base_is_named(refused: Callable[..., str], files: Any, tmp_path: Path) -> None:
    line = ask(refused, *files.model, "--model", tmp_path / "nowhere")
    assert f"base model '{tmp_path / 'nowhere'}' can't be loaded" in line


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_base_is_named(
    refused: Callable[..., str], files: Any, tmp_path: Path, file: str, damage: str
) -> None:
    base = Path(shutil.copytree(files.base, tmp_path / "base"))
    data = (base / file).read_bytes()
    (base / file).unlink()
    if damage != "missing":
        (base / file).write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    assert str(base) in ask(refused, *files.model, "--model", base)


def test_a_base_without_tokenizer_is_refused_where_text_is_read(
    refused: Callable[..., str], files: Any, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    for file in files.base.iterdir():
        if "token" not in file.name:
            shutil.copy(file, tmp_path / "base")
    assert "tokenizer" in ask(refused, *files.model, "--model", tmp_path / "base")


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(refused: Callable[..., str], files: Any, device: str) -> None:
    line = ask(refused, *files.model, "--device", device)
    assert f"--device must be a device of this machine, but {device!r} is not: " in line


def test_an_unknown_dtype_is_refused(refused: Callable[..., str], files: Any) -> None:
    assert "argument --dtype: invalid choice: 'int8'" in ask(refused, *files.model, "--dtype", "int8")


@pytest.mark.parametrize("size", [60, 5000])
@pytest.mark.parametrize("command", ["adapt", "peft", "merged"])
def test_a_full_disk_is_told_with_the_name_of_the_file(
    refused: Callable[..., str], files: Any, document: Path, adapter: Path, tmp_path: Path, command: str, size: int
) -> None:
    before, output = sorted(tmp_path.iterdir()), tmp_path / "output"
    arguments = ["export", "--adapter", adapter, "--format", command, *files.model, "--output", output]
    if command == "adapt":
        arguments = ["adapt", *files.model, "--document", document, "--output", output]
    with files_of_at_most(size):
        assert str(output) in refused(*arguments)
    assert sorted(tmp_path.iterdir()) == before
