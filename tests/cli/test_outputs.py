"""Where the output of commands goes: readers that leave, disks that are full, files that are links, `~` in paths."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import code_of
from tiny import same_adapters

from gakernels import Adapter, InputError
from gakernels.cli import _parser, main
from gakernels.training.instruction.recipe import FinetuningRecipe
from gakernels.training.pretraining_recipe import PretrainingRecipe
from gakernels.training.recipes import load_recipe

TALKING = [
    ["--help"],
    ["pretrain", "--help"],
    ["--version"],
    ["info"],
    ["info", "--model", "mistral-7b"],
    ["eval", "cost", "--shape", "mistral-7b"],
    ["pretrain", "--config", "mistral-7b-pretraining", "--dry-run"],
]


def code_and_errors(arguments: list[str], stdout: int, tmp_path: Path) -> tuple[int, str]:
    with (tmp_path / "stderr").open("w") as stderr:
        code = code_of(lambda: main(arguments), stdout, stderr.fileno())
    return code, (tmp_path / "stderr").read_text()


@pytest.mark.parametrize("arguments", TALKING, ids=" ".join)
def test_a_command_whose_output_nobody_reads_ends_silently(tmp_path: Path, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert code_and_errors(arguments, writing, tmp_path) == (141, "")
    os.close(writing)


@pytest.mark.parametrize("arguments", TALKING, ids=" ".join)
def test_an_output_that_can_not_be_written_is_told_in_one_line(tmp_path: Path, arguments: list[str]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    code, errors = code_and_errors(arguments, full, tmp_path)
    os.close(full)
    assert code == 2
    assert errors.startswith("gakernels")
    assert errors.endswith("[Errno 28] No space left on device\n")
    assert errors.count("\n") == 1


def test_mistakes_that_nobody_reads_are_silent_too(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert code_of(lambda: main(["ask", "--generator", "nowhere", "w3"]), writing, writing) == 141
    os.close(writing)


def test_an_adapter_through_the_standard_output(files: Any, document: Path, adapter: Path, tmp_path: Path) -> None:
    """What is said besides goes to the standard error."""
    command = ["adapt", *files.model, "--document", str(document), "--output", "/dev/stdout"]
    with (tmp_path / "out").open("w") as out:
        code, errors = code_and_errors(command, out.fileno(), tmp_path)
    assert code == 0
    assert "tokens read in" in errors
    assert same_adapters(Adapter.load(tmp_path / "out"), Adapter.load(adapter))


@pytest.mark.parametrize("command", ["adapt", "state", "gguf", "plot", "cost"])
def test_a_folder_where_a_file_is_to_be_written(
    run: Callable[..., Any], document: Path, adapter: Path, tmp_path: Path, command: str
) -> None:
    """It is told before anything is read or computed."""
    adapt = ["adapt", "--generator", "nowhere", "--document", document]
    arguments = {
        "adapt": [*adapt, "--output", tmp_path],
        "state": [*adapt, "--output", tmp_path / "a", "--state", tmp_path],
        "gguf": ["export", "--adapter", adapter, "--format", "gguf", "--output", tmp_path],
        "plot": ["plot", tmp_path, "--output", tmp_path],
        "cost": ["eval", "cost", "--shape", "mistral-7b", "--json", tmp_path],
    }
    outcome = run(*arguments[command])
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert f"must be a file, but {tmp_path} is a folder" in outcome.err


# --- the home folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def home(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "generator").symlink_to(files.generator)
    (tmp_path / "home" / "base").symlink_to(files.base)
    return tmp_path / "home"


def test_paths_with_a_tilde_that_no_shell_expanded(
    run: Callable[..., Any], home: Path, document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    document.rename(home / "text")
    model = ["--generator=~/generator", "--model=~/base"]
    assert run("adapt", *model, "--document=~/text", "--state=~/new/s", "--output=~/new/a").code == 0
    assert run("ask", *model, "--adapter=~/new/a", "w3").code == 0
    assert run("export", "--adapter=~/new/a", "--output=~/new/peft").code == 0
    (home / "recipe.yaml").write_text("model: {name: ~/base}\ndata: {path: ~/text}\ntrainer: {steps: 1}\n")
    outcome = run("pretrain", "--config=~/recipe.yaml", "--set", "model.name=~/base", "--dry-run")
    assert outcome.code == 0, outcome
    assert sorted(path.name for path in home.iterdir()) == ["base", "generator", "new", "recipe.yaml", "text"]


def test_every_option_that_names_a_path_expands_it(home: Path) -> None:
    def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
        found = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [option for inner in action.choices.values() for option in options_of(inner)]
            found.append(action)
        return found

    kinds = {option.dest: option.type for option in options_of(_parser()) if option.type not in (None, int, float)}
    assert len(kinds) > 15
    for name, kind in kinds.items():
        assert str(kind("~/x")) == str(home / "x"), name


def test_every_path_of_a_recipe_expands_it(home: Path, tmp_path: Path) -> None:
    def paths_in(value: Any) -> set[str]:
        inner = (
            value.values() if isinstance(value, dict) else vars(value).values() if hasattr(value, "__dict__") else ()
        )
        return set().union(*map(paths_in, inner)) if inner else {str(value)}

    given = {
        "model": {"name": "~/a"},
        "data": {"sources": {"one": {"path": "~/b"}}, "held_out_path": "~/c", "cache": "~/d"},
        "trainer": {"steps": 1},
    }
    tuned = {
        "start": "~/e",
        "model": {"name": "~/f"},
        "data": {"sources": {"one": {"path": "~/g"}}, "held_out_path": "~/h"},
    }
    for kind, values in ((PretrainingRecipe, given), (FinetuningRecipe, tuned)):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        found = paths_in(load_recipe(kind, tmp_path / "recipe.yaml"))
        wanted = paths_in(values) - {"1"}
        assert {path.replace("~", str(home)) for path in wanted} <= found
        assert not any(path.startswith("~") for path in found)
    short = load_recipe(PretrainingRecipe, None, ["model.name=m", "data.path=~/x", "trainer.steps=1"])
    assert short.data.path == str(home / "x")


def test_names_that_are_no_paths_stay(home: Path) -> None:
    overrides = ["model.name=owner/model", "data.path=hub:owner/data:train", "trainer.steps=1"]
    recipe = load_recipe(PretrainingRecipe, None, overrides)
    assert (recipe.model.name, recipe.data.path) == ("owner/model", "hub:owner/data:train")
    recipe = load_recipe(PretrainingRecipe, None, [*overrides, "data.path=~nobody-of-that-name/x"])
    assert recipe.data.path == "~nobody-of-that-name/x"
    with pytest.raises(InputError):
        load_recipe(PretrainingRecipe, None, [*overrides, "data.path="])
