"""A tiny base model and generator on disk, and a way to run commands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from invented import make_tokenizer, random_text
from tiny import make_base, make_config, make_trained

from gakernels import GenerativeAdapter
from gakernels.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Files:
    """What was made once for all tests of this folder; none of them changes it."""

    base: Path
    generator: Path
    other_base: Path
    other_generator: Path

    @property
    def model(self) -> list[str]:
        return ["--generator", str(self.generator)]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("models")
    for prefix in ("", "other_"):
        base, tokenizer = make_base(), make_tokenizer()
        base.save_pretrained(folder / f"{prefix}base")
        tokenizer.save_pretrained(folder / f"{prefix}base")
        base.config.name_or_path = str(folder / f"{prefix}base")
        model = make_trained(GenerativeAdapter(base, make_config(chunk_size=16), tokenizer))
        model.save_pretrained(folder / f"{prefix}generator")
    return Files(folder / "base", folder / "generator", folder / "other_base", folder / "other_generator")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command with the given arguments in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse's own way
            code = exit.code
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text(random_text(40))
    return path


@pytest.fixture
def adapter(run: Callable[..., Outcome], files: Files, document: Path, tmp_path: Path) -> Path:
    """An adapter file of the document."""
    path = tmp_path / "adapter.safetensors"
    assert run("adapt", *files.model, "--document", document, "--output", path).code == 0
    return path


@pytest.fixture
def refused(run: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs a command that must fail as a user's mistake does: code 2, nothing but one line; returns that line."""

    def refused(*arguments: object) -> str:
        outcome = run(*arguments)
        assert outcome.code == 2, outcome
        assert outcome.err.startswith(f"gakernels {arguments[0]}: "), outcome.err
        assert outcome.err.count("\n") == 1, outcome.err
        assert outcome.err.endswith("\n")
        assert outcome.out == ""
        return outcome.err

    return refused
