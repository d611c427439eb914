"""A run that is interrupted and resumed equals one that was not."""

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from regression import InterruptionError, Problem, drawn_seed, interrupted, log_of, make_trainer

from gakernels import FormatError
from gakernels.training.checkpoint import find_checkpoints


def run_until(folder: Path, seed: int, at: int, **settings: Any) -> None:
    problem = Problem(seed)
    with pytest.raises(InterruptionError):
        make_trainer(problem, folder, interrupted(problem, at), **settings).run()


@pytest.mark.parametrize("at", [2, 5, 8, 10, 19])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_it_equals_the_uninterrupted_run_bit_by_bit(tmp_path: Path, at: int, schedule: str) -> None:
    seed, settings = drawn_seed(), {"schedule": schedule, "learning_rate_factors": (("second*", 0.1),)}
    whole, resumed = Problem(seed), Problem(seed)
    make_trainer(whole, tmp_path / "whole", **settings).run()
    run_until(tmp_path / "parts", seed, at, **settings)
    make_trainer(resumed, tmp_path / "parts", **settings).run()
    assert resumed.steps_taken == list(range(at // 5 * 5, 20))
    assert all(a.equal(b) for a, b in zip(whole.values(), resumed.values(), strict=True))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    names = [path.name for path in find_checkpoints(tmp_path / "parts" / "checkpoints")]
    assert names == ["step-00000015", "step-00000020"]


def test_several_interruptions_do_no_harm(tmp_path: Path) -> None:
    seed = drawn_seed()
    whole, resumed = Problem(seed), Problem(seed)
    make_trainer(whole, tmp_path / "whole").run()
    for at in (7, 7, 12, 11, 16):
        run_until(tmp_path / "parts", seed, at)
    make_trainer(resumed, tmp_path / "parts").run()
    assert all(a.equal(b) for a, b in zip(whole.values(), resumed.values(), strict=True))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_what_an_objective_draws_from_the_global_generators_is_the_same_in_a_resumed_run(tmp_path: Path) -> None:
    drawn: dict[Path, dict[int, tuple[float, ...]]] = {}

    def objective_in(folder: Path, problem: Problem, at: int) -> Any:
        def objective(step: int) -> Any:
            numbers = (random.random(), float(numpy.random.rand()), float(torch.rand(())))
            if step == at:
                raise InterruptionError
            drawn.setdefault(folder, {})[step] = numbers
            return problem.objective(step)

        return objective

    whole, parts, seed = tmp_path / "whole", tmp_path / "parts", drawn_seed()
    before = torch.rand(()), random.getstate(), torch.get_rng_state()
    make_trainer(Problem(seed), whole, objective_in(whole, Problem(seed), 99)).run()
    assert random.getstate() == before[1]
    assert torch.get_rng_state().equal(before[2])
    for at in (8, 99):
        torch.manual_seed(at)
        trainer = make_trainer(Problem(seed), parts, objective_in(parts, Problem(seed), at))
        if at == 8:
            with pytest.raises(InterruptionError):
                trainer.run()
        else:
            trainer.run()
    assert drawn[whole] == drawn[parts]
    assert len(set(drawn[whole].values())) == 20
    other = make_trainer(Problem(seed), None, objective_in(tmp_path, Problem(seed), 99), seed=1, steps=3)
    other.run()
    assert drawn[tmp_path][0] != drawn[whole][0]


@pytest.mark.parametrize(
    "settings",
    [{"keep_checkpoints": 7}, {"label": "another name"}, {"peak_tflops": 1.0}, {"reports": ()}],
)
def test_settings_that_change_no_number_may_be_others(tmp_path: Path, settings: dict[str, Any]) -> None:
    seed = drawn_seed()
    run_until(tmp_path, seed, 7)
    problem = Problem(seed)
    make_trainer(problem, tmp_path, **settings).run()
    assert problem.steps_taken[0] == 5


def test_the_same_trainer_can_go_on(tmp_path: Path) -> None:
    seed = drawn_seed()
    whole, problem = Problem(seed), Problem(seed)
    make_trainer(whole, tmp_path / "whole").run()
    trainer = make_trainer(problem, tmp_path / "parts", interrupted(problem, 8))
    with pytest.raises(InterruptionError):
        trainer.run()
    trainer.step.objective = problem.objective
    trainer.run()
    assert all(a.equal(b) for a, b in zip(whole.values(), problem.values(), strict=True))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    seed = drawn_seed()
    run_until(tmp_path, seed, 14)
    log = tmp_path / "log.jsonl"
    assert [line["step"] for line in log_of(tmp_path)] == [3, 6, 9, 12]
    with log.open("a") as file:
        file.write('{"step": 13, "loss": {"regr')  # power failed
    run_until(tmp_path, seed, 10)
    assert [line["step"] for line in log_of(tmp_path)] == [3, 6, 9]


def test_a_log_without_checkpoints_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 3}\n7\n[]\n')
    make_trainer(Problem(drawn_seed()), tmp_path, steps=1).run()
    assert [line["step"] for line in log_of(tmp_path)] == [1]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    seed = drawn_seed()
    make_trainer(Problem(seed), tmp_path).run()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = Problem(seed)
    assert make_trainer(again, tmp_path).run() == []
    assert again.steps_taken == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.04}, r"other settings: trainer\.learning_rate was 0\.05 and is 0\.04\. Use another"),
        ({"steps": 30}, r"other settings: trainer\.steps was 20 and is 30\. "),
        ({"betas": (0.8, 0.999)}, r"trainer\.betas was \[0\.9, 0\.999\] and is \[0\.8, 0\.999\]"),
        (
            {"loss_weights": (("penalty", 0.5),), "clip": 2.0},
            r"trainer\.clip was 1\.0 and is 2\.0; trainer\.loss_weights was \[\] and is \[\['penalty', 0\.5\]\]",
        ),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    seed = drawn_seed()
    run_until(tmp_path, seed, 7)
    log = (tmp_path / "log.jsonl").read_text()
    problem = Problem(seed)
    before = problem.values()
    with pytest.raises(FormatError, match=message):
        make_trainer(problem, tmp_path, **settings).run()
    assert all(a.equal(b) for a, b in zip(before, problem.values(), strict=True))
    assert (tmp_path / "log.jsonl").read_text() == log


def test_other_settings_of_the_caller_are_refused_too(tmp_path: Path) -> None:
    seed = drawn_seed()
    run_until(tmp_path, seed, 7)
    other = Problem(seed)
    trainer = make_trainer(other, tmp_path)
    trainer.settings |= {"data": {"folder": {"name": "texts"}}, "seed": seed + 1}
    with pytest.raises(
        FormatError, match=f"data.folder.name was None and is 'texts'; seed was {seed} and is {seed + 1}"
    ):
        trainer.run()


@pytest.mark.parametrize("change", ["shape", "name"])
def test_other_parameters_are_refused(tmp_path: Path, change: str) -> None:
    seed = drawn_seed()
    run_until(tmp_path, seed, 7)
    other = Problem(seed)
    if change == "shape":
        other.parameters["bias"] = torch.nn.Parameter(torch.zeros(3))
    else:
        other.parameters["bias2"] = other.parameters.pop("bias")
    with pytest.raises(FormatError, match="step-00000005 holds other parameters than this run trains"):
        make_trainer(other, tmp_path).run()
