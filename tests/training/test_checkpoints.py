"""Checkpoints: how many are kept, and that no failure costs the last good one."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from limits import files_of_at_most
from regression import InterruptionError, Problem, drawn_seed, interrupted, log_of, make_trainer
from safetensors.torch import load_file
from torch import Tensor

from gakernels import FormatError
from gakernels.training import checkpoint
from gakernels.training.checkpoint import MANIFEST, find_checkpoints


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in find_checkpoints(folder / "checkpoints")]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_other_files_left_alone(tmp_path: Path, keep: int) -> None:
    (tmp_path / "checkpoints").mkdir()
    others = [tmp_path / "checkpoints" / name for name in ("step-best", "step-00000001", "step-00000001.bak")]
    for path in others:
        path.write_text("mine")
    make_trainer(Problem(drawn_seed()), tmp_path, steps=18, keep_checkpoints=keep).run()
    assert steps_of(tmp_path) == [5, 10, 15, 18][-keep:]
    names = {f"step-{step:08d}" for step in steps_of(tmp_path)}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == names | {path.name for path in others}


def cut(data: bytes) -> bytes:
    return data[: int(torch.randint(0, len(data), ()))]


def flip(data: bytes) -> bytes:
    place = int(torch.randint(0, len(data), ()))
    return data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :]


@pytest.mark.parametrize("name", [MANIFEST, "shard-00001-model-00001-of-00001.safetensors"])
@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", None])
def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes] | None, name: str
) -> None:
    seed = drawn_seed()
    whole = Problem(seed)
    make_trainer(whole, tmp_path).run()
    log = log_of(tmp_path)
    newest = find_checkpoints(tmp_path / "checkpoints")[-1] / name
    if damage is None:
        newest.unlink()
    else:
        newest.write_bytes(damage(newest.read_bytes()))
    problem = Problem(seed)
    make_trainer(problem, tmp_path).run()
    message = capsys.readouterr().err
    assert "step-00000020 is damaged: " in message
    assert name in message
    assert "resuming from an earlier one" in message
    assert problem.steps_taken == list(range(15, 20))
    assert all(a.equal(b) for a, b in zip(whole.values(), problem.values(), strict=True))
    assert log_of(tmp_path) == log
    assert steps_of(tmp_path) == [15, 20]
    assert (tmp_path / "checkpoints" / "step-00000020.damaged").is_dir()  # still there to be looked at


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    seed = drawn_seed()
    make_trainer(Problem(seed), tmp_path).run()
    for path in find_checkpoints(tmp_path / "checkpoints"):
        (path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    log, problem = (tmp_path / "log.jsonl").read_text(), Problem(seed)
    with pytest.raises(FormatError, match=r"step-00000020 is damaged.*step-00000015 is damaged.*None is left"):
        make_trainer(problem, tmp_path).run()
    assert problem.steps_taken == []
    assert (tmp_path / "log.jsonl").read_text() == log
    assert steps_of(tmp_path) == [15, 20]


def test_what_a_killed_process_left_is_never_taken_and_goes(tmp_path: Path) -> None:
    seed = drawn_seed()
    problem = Problem(seed)
    with pytest.raises(InterruptionError):
        make_trainer(problem, tmp_path, interrupted(problem, 12)).run()
    folder = tmp_path / "checkpoints"
    unfinished = folder / ".step-00000015.123-0af3.tmp"
    shutil.copytree(folder / "step-00000010", unfinished)
    resumed = Problem(seed)
    make_trainer(resumed, tmp_path).run()
    assert resumed.steps_taken[0] == 10
    assert not unfinished.exists()


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = drawn_seed()
    with monkeypatch.context() as patch:
        patch.setattr("gakernels.training.checkpoint.FORMAT_VERSION", 99)
        make_trainer(Problem(seed), tmp_path).run()
    with pytest.raises(FormatError, match=r"has format version 99, written by gakernels .*; this version reads up to"):
        make_trainer(Problem(seed), tmp_path).run()
    assert steps_of(tmp_path) == [15, 20]


def test_one_of_a_newer_version_is_not_passed_over_for_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = drawn_seed()
    problem = Problem(seed)
    with pytest.raises(InterruptionError):
        make_trainer(problem, tmp_path, interrupted(problem, 17)).run()
    with monkeypatch.context() as patch:
        patch.setattr("gakernels.training.checkpoint.FORMAT_VERSION", 99)
        make_trainer(Problem(seed), tmp_path).run()
    with pytest.raises(FormatError, match=r"step-00000020 has format version 99"):
        make_trainer(Problem(seed), tmp_path).run()
    assert steps_of(tmp_path) == [15, 20]


def test_the_manifest_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    problem = Problem(drawn_seed())
    make_trainer(problem, tmp_path, clip=0.5).run()
    outer: dict[str, Any] = json.loads((tmp_path / "checkpoints" / "step-00000020" / MANIFEST).read_text())
    manifest = json.loads(outer["manifest"])
    assert manifest["step"] == 20
    assert manifest["settings"]["trainer"]["clip"] == 0.5
    assert manifest["settings"]["seed"] == problem.seed
    assert set(manifest["files"]) == {"shard-00001-model-00001-of-00001.safetensors"}


def test_parameters_that_are_not_finite_are_not_saved_though_all_losses_were(tmp_path: Path) -> None:
    problem = Problem(drawn_seed())
    trainer = make_trainer(problem, tmp_path, steps=5)

    def overflow(*_: object) -> None:
        if problem.steps_taken[-1] == 4:
            problem.parameters["bias"].data[0] = torch.inf

    trainer.optimizer.register_step_post_hook(overflow)
    with pytest.raises(FloatingPointError, match="training stopped: bias is not finite after step 5"):
        trainer.run()
    assert steps_of(tmp_path) == []


@pytest.mark.parametrize(("size", "name"), [(100, "log.jsonl"), (1500, "step-00000015")])
def test_a_failed_write_is_named_and_leaves_the_last_good_checkpoint(tmp_path: Path, size: int, name: str) -> None:
    seed = drawn_seed()
    problem, whole, resumed = Problem(seed), Problem(seed), Problem(seed)
    make_trainer(whole, tmp_path / "whole", log_every=5).run()
    with pytest.raises(InterruptionError):
        make_trainer(problem, tmp_path / "parts", interrupted(problem, 11), log_every=5).run()
    before = (tmp_path / "parts" / "log.jsonl").read_text()
    with files_of_at_most(size), pytest.raises(OSError, match=re.escape(f"{tmp_path}/parts/")) as failure:
        make_trainer(problem, tmp_path / "parts", log_every=5).run()
    assert name in str(failure.value)
    assert ".tmp" not in str(failure.value)
    assert "\n" not in str(failure.value)
    assert steps_of(tmp_path / "parts") == [5, 10]
    assert len(list((tmp_path / "parts" / "checkpoints").iterdir())) == 2
    assert (tmp_path / "parts" / "log.jsonl").read_text().startswith(before)
    make_trainer(resumed, tmp_path / "parts", log_every=5).run()
    assert all(a.equal(b) for a, b in zip(whole.values(), resumed.values(), strict=True))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, write, may_write = Problem(drawn_seed()), checkpoint._write, Event()
    monkeypatch.setattr(checkpoint, "_write", lambda *values: may_write.wait(60) and write(*values))
    after: dict[int, dict[str, Tensor]] = {}

    def objective(step: int) -> Any:
        after[step] = {f"parameter/{name}": value.detach().clone() for name, value in problem.parameters.items()}
        if step == 8:
            assert steps_of(tmp_path) == []
            may_write.set()
        return problem.objective(step)

    make_trainer(problem, tmp_path, objective, keep_checkpoints=4).run()
    assert steps_of(tmp_path) == [5, 10, 15, 20]
    for step in (5, 10, 15):
        file = tmp_path / "checkpoints" / f"step-{step:08d}" / "shard-00001-model-00001-of-00001.safetensors"
        saved = load_file(file)
        assert all(torch.equal(saved[name], value) for name, value in after[step].items())


def test_a_failure_after_the_last_step_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint, "_write", fail)
    with pytest.raises(OSError, match="the disk is full"):
        make_trainer(Problem(drawn_seed()), tmp_path, steps=4).run()
