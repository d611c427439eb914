"""Checkpoints: how many are kept, and that no failure costs the last good one."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from limits import files_of_at_most
from regression import InterruptionError, Problem, drawn_seed, interrupted, log_of, make_trainer
from torch import Tensor

from gakernels import FormatError
from gakernels.training.checkpoint import find_checkpoints
from gakernels.training.objectives import Loss


def steps_of(folder: Path) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in find_checkpoints(folder / "checkpoints")]


def test_the_two_newest_are_kept_and_other_files_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    others = [tmp_path / "checkpoints" / name for name in ("step-best.safetensors", "step-00000001.safetensors.bak")]
    for path in others:
        path.write_text("mine")
    make_trainer(Problem(drawn_seed()), tmp_path, steps=18).run()
    assert steps_of(tmp_path) == [15, 18]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "step-00000015.safetensors",
        "step-00000018.safetensors",
        *[path.name for path in others],
    }


def cut(data: bytes) -> bytes:
    return data[: int(torch.randint(0, len(data), ()))]


def flip(data: bytes) -> bytes:
    place = len(data) - 1 - int(torch.randint(0, 100, ()))  # among the numbers, which come last
    return data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", lambda data: b"\x00" * len(data)])
def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_is_left(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    seed = drawn_seed()
    whole = Problem(seed)
    make_trainer(whole, tmp_path).run()
    older, newest = find_checkpoints(tmp_path / "checkpoints")
    good = older.read_bytes()
    newest.write_bytes(damage(newest.read_bytes()))
    problem = Problem(seed)
    before = problem.values()
    with pytest.raises(FormatError, match=r"step-00000020\.safetensors is damaged"):
        make_trainer(problem, tmp_path).run()
    assert all(a.equal(b) for a, b in zip(before, problem.values(), strict=True))
    assert older.read_bytes() == good
    newest.unlink()  # what a user would do
    make_trainer(problem, tmp_path).run()
    assert problem.steps_taken == list(range(15, 20))
    assert all(a.equal(b) for a, b in zip(whole.values(), problem.values(), strict=True))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named_and_never_saved(tmp_path: Path, what: str) -> None:
    problem = Problem(drawn_seed())
    bad = int(torch.randint(6, 19, ()))

    def objective(step: int) -> dict[str, Loss]:
        losses = problem.objective(step)
        if step + 1 == bad:
            losses["penalty"] = Loss(spoil(losses["penalty"].total, what), losses["penalty"].tokens)
        return losses

    name = "loss 'penalty'" if what == "loss" else "gradient"
    with pytest.raises(FloatingPointError, match=f"training stopped: the {name} of step {bad} is not finite"):
        make_trainer(problem, tmp_path, objective).run()
    last = (bad - 1) // 5 * 5
    assert steps_of(tmp_path) == [step for step in (last - 5, last) if step > 0]
    assert log_of(tmp_path)[-1]["step"] < bad
    for step in steps_of(tmp_path):
        for key in ("regression", "penalty"):
            assert all(0 < line["loss"][key] < 1e6 for line in log_of(tmp_path) if line["step"] <= step)
    good = Problem(problem.seed)
    make_trainer(good, tmp_path).run()  # goes on from the last good state
    assert good.steps_taken[0] == last
    assert all(value.isfinite().all() for value in good.values())


def spoil(total: Tensor, what: str) -> Tensor:
    """A loss of NaN, or a finite one whose gradient is infinite."""
    if what == "loss":
        return total * torch.nan
    zero = (total - total.detach()).abs()
    return total.detach() + torch.where(zero == 0, zero, zero.sqrt()) + (zero + 1e-45).sqrt() * 1e-10


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


@pytest.mark.parametrize(("size", "name"), [(100, "log.jsonl"), (1200, "step-00000015.safetensors")])
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
    assert "\n" not in str(failure.value)
    assert steps_of(tmp_path / "parts") == [5, 10]
    assert {path.suffix for path in (tmp_path / "parts").rglob("*") if path.is_file()} == {".jsonl", ".safetensors"}
    assert (tmp_path / "parts" / "log.jsonl").read_text().startswith(before)
    make_trainer(resumed, tmp_path / "parts", log_every=5).run()
    assert all(a.equal(b) for a, b in zip(whole.values(), resumed.values(), strict=True))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
