"""The log of a run and where its numbers go besides."""

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from regression import InterruptionError, Problem, drawn_seed, interrupted, make_trainer

from gakernels import InputError
from gakernels.model.window_losses import Loss
from gakernels.training.run_log import StepCost, flat_numbers, read_log


def test_rates_come_from_the_cost_of_a_step(tmp_path: Path) -> None:
    trainer = make_trainer(Problem(drawn_seed()), tmp_path, peak_tflops=2.0)
    trainer.cost = StepCost(tokens=640, flops=5e9)
    for line in trainer.run():
        assert line["tokens_per_second"] == pytest.approx(640 / line["seconds_per_step"])
        assert line["mfu"] == pytest.approx(5e9 / line["seconds_per_step"] / 2e12)
        assert line["peak_bytes"] > 1e6


def test_what_is_not_known_is_not_logged(tmp_path: Path) -> None:
    trainer = make_trainer(Problem(drawn_seed()), tmp_path)  # a CPU's peak is not known
    trainer.cost = StepCost(flops=5e9)
    assert not any({"tokens_per_second", "mfu", "skipped", "evaluation"} & set(line) for line in trainer.run())


def test_a_loss_without_targets_has_no_mean(tmp_path: Path) -> None:
    problem = Problem(drawn_seed())

    def objective(step: int) -> dict[str, Loss]:
        nothing = torch.zeros(()) if step < 3 else torch.tensor(6.0)
        return {**problem.objective(step), "rare": Loss(nothing, (nothing / 2).long())}

    lines = make_trainer(problem, tmp_path, objective, steps=6).run()
    assert set(lines[0]["loss"]) == {"regression", "penalty"}
    assert lines[1]["loss"]["rare"] == 2.0


def test_devices_share_the_work() -> None:
    assert StepCost(10, 4e12).rates(2.0, devices=4, peak_tflops=1.0) == {"tokens_per_second": 5.0, "mfu": 0.5}


def test_evaluations_stand_in_the_log_and_are_there_in_a_resumed_run(tmp_path: Path) -> None:
    seed = drawn_seed()

    def run(folder: Path, at: int) -> None:
        problem = Problem(seed)
        trainer = make_trainer(problem, folder, interrupted(problem, at), evaluate_every=4)
        trainer.evaluate = lambda: {"size": float(problem.parameters["first"].detach().norm())}
        trainer.run()

    run(tmp_path / "whole", 99)
    with pytest.raises(InterruptionError):
        run(tmp_path / "parts", 13)
    run(tmp_path / "parts", 99)
    whole, parts = (
        {line["step"]: line.get("evaluation") for line in read_log(tmp_path / name / "log.jsonl")}
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert [step for step, found in whole.items() if found] == [4, 8, 12, 16, 20]
    assert list(whole) == [3, 4, 6, 8, 9, 12, 15, 16, 18, 20]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "loss": {}}\n{"step": 3, "lo\xff')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2, "loss": {}}]
    with pytest.raises(InputError, match=r"there is no file .*other\.jsonl"):
        read_log(tmp_path / "other.jsonl")


def test_numbers_get_flat_names() -> None:
    line = {"step": 3, "loss": {"a": 1.0, "b": {"c": 2}}, "skipped": [1], "gradient_norm": None, "x": True}
    assert flat_numbers(line) == {"loss/a": 1.0, "loss/b/c": 2}


def test_tensorboard_has_the_numbers_of_the_log(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seed = drawn_seed()
    problem = Problem(seed)
    with pytest.raises(InterruptionError):
        make_trainer(problem, tmp_path, interrupted(problem, 13), reports=("tensorboard",)).run()
    make_trainer(Problem(seed), tmp_path, reports=("tensorboard",)).run()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = read_log(tmp_path / "log.jsonl")
    for name in ("regression", "penalty"):
        found = {event.step: event.value for event in events.Scalars(f"loss/{name}")}
        assert found == pytest.approx({line["step"]: line["loss"][name] for line in lines}, rel=1e-6)
    assert len(events.Scalars("learning_rate")) == len(lines)


def test_weights_and_biases_gets_the_same_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the package."""
    runs: list[dict[str, Any]] = []

    class Run:
        def __init__(self, **options: Any) -> None:
            runs.append(options | {"logged": {}})

        def log(self, values: dict[str, float], step: int) -> None:
            runs[-1]["logged"][step] = values

        def finish(self) -> None:
            runs[-1]["finished"] = True

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    problem = Problem(drawn_seed())
    with pytest.raises(InterruptionError):
        make_trainer(problem, tmp_path, interrupted(problem, 13), reports=("wandb",)).run()
    make_trainer(Problem(problem.seed), tmp_path, reports=("wandb",)).run()
    first, second = runs
    assert first["id"] == second["id"]
    assert first["config"]["seed"] == problem.seed
    assert first["finished"]
    assert second["finished"]
    assert list(second["logged"]) == [12, 15, 18, 20]
    lines = {line["step"]: line for line in read_log(tmp_path / "log.jsonl")}
    assert second["logged"][15] == flat_numbers(lines[15])


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_report_whose_package_is_missing_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    problem = Problem(drawn_seed())
    with pytest.raises(InputError, match=f"reports: '{name}' needs the package {name}, which is not installed"):
        make_trainer(problem, tmp_path, reports=(name,)).run()
    assert problem.steps_taken == []


def test_lines_are_json_for_every_reader(tmp_path: Path) -> None:
    trainer = make_trainer(Problem(drawn_seed()), tmp_path, evaluate_every=5)
    trainer.evaluate = lambda: {"perplexity": [math.inf, 1.0], "ratio": math.nan}
    trainer.run()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert read_log(tmp_path / "log.jsonl")[-1]["evaluation"] == {"perplexity": [None, 1.0], "ratio": None}
