"""Checkpoints of version 2, with a pickle: refused by a run, converted by a command that asks for trust."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from regression import InterruptionError, Problem, drawn_seed, interrupted, log_of, make_trainer
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from gakernels import FormatError
from gakernels.cli import main
from gakernels.training.checkpoint import MANIFEST, find_checkpoints, read_any_manifest


class Bomb:
    """A pickle of it writes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.mark, "boom")


def make_old(path: Path) -> None:
    """Rewrite a checkpoint as version 2 had it: PyTorch's own files, with the tensors that it holds."""
    manifest, tensors = read_any_manifest(path), {}
    for file in list(path.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    save(tensors, storage_writer=FileSystemWriter(path), no_dist=True)
    files = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in (".metadata", "__0_0.distcp")}
    text = json.dumps({**manifest, "format_version": 2, "files": files})
    sums = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}
    (path / MANIFEST).write_text(json.dumps(sums))


@pytest.fixture
def interrupted_run(tmp_path: Path) -> tuple[int, Path]:
    """A run that stopped after 12 steps, its checkpoints of the old version; and its seed."""
    seed = drawn_seed()
    problem = Problem(seed)
    with pytest.raises(InterruptionError):
        make_trainer(problem, tmp_path / "run", interrupted(problem, 12)).run()
    for path in find_checkpoints(tmp_path / "run" / "checkpoints"):
        make_old(path)
    return seed, tmp_path / "run"


def test_a_run_refuses_them_and_names_the_command(interrupted_run: tuple[int, Path]) -> None:
    seed, folder = interrupted_run
    with pytest.raises(FormatError, match=r"of which a file is a pickle.*gakernels convert-checkpoint .* --trust"):
        make_trainer(Problem(seed), folder).run()


def test_converted_they_go_on_exactly(interrupted_run: tuple[int, Path], tmp_path: Path) -> None:
    seed, folder = interrupted_run
    assert main(["convert-checkpoint", str(folder), "--trust"]) == 0
    whole, resumed = Problem(seed), Problem(seed)
    make_trainer(whole, tmp_path / "whole").run()
    make_trainer(resumed, folder).run()
    assert resumed.steps_taken[0] == 10
    assert all(a.equal(b) for a, b in zip(whole.values(), resumed.values(), strict=True))
    assert log_of(folder) == log_of(tmp_path / "whole")
    for path in find_checkpoints(folder / "checkpoints"):
        assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    assert len(list((folder / "checkpoints").iterdir())) == len(find_checkpoints(folder / "checkpoints"))


def test_without_trust_nothing_is_read(
    interrupted_run: tuple[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = interrupted_run
    for path in find_checkpoints(folder / "checkpoints"):
        (path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    assert main(["convert-checkpoint", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "--trust is needed" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "mark").exists()


def test_there_is_nothing_to_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-checkpoint", str(tmp_path), "--trust"]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
    make_trainer(Problem(drawn_seed()), tmp_path, steps=5).run()
    assert main(["convert-checkpoint", str(tmp_path), "--trust"]) == 0
    assert "holds no checkpoint of an earlier version" in capsys.readouterr().out


@pytest.mark.parametrize("trust_checksums", [False, True])
def test_no_file_of_a_checkpoint_of_this_version_runs(tmp_path: Path, trust_checksums: bool) -> None:
    """Also where whoever put it there wrote the checksums anew."""
    seed = drawn_seed()
    make_trainer(Problem(seed), tmp_path / "run").run()
    bomb = pickle.dumps(Bomb(tmp_path / "mark"))
    for path in find_checkpoints(tmp_path / "run" / "checkpoints"):
        (path / ".metadata").write_bytes(bomb)
        (path / "__0_0.distcp").write_bytes(bomb)
        (tensors,) = path.glob("*.safetensors")
        tensors.write_bytes(bomb)
        if trust_checksums:
            manifest = read_any_manifest(path)
            files = {tensors.name: hashlib.sha256(bomb).hexdigest()}
            text = json.dumps({**manifest, "files": files})
            sums = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}
            (path / MANIFEST).write_text(json.dumps(sums))
    with pytest.raises(FormatError, match="is damaged"):
        make_trainer(Problem(seed), tmp_path / "run").run()
    assert not (tmp_path / "mark").exists()
