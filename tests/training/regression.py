"""A small problem to train on: two layers, two losses, batches that depend on the step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gakernels.training.objectives import Loss
from gakernels.training.trainer import Trainer, TrainerConfig


class Problem:
    """Parameters, and an objective of which the first loss is a regression and the second a penalty."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.parameters = {
            "first": nn.Parameter(torch.randn(4, 3, generator=random)),
            "second/weight.x": nn.Parameter(torch.randn(2, 4, generator=random)),
            "bias": nn.Parameter(torch.randn(2, generator=random)),
        }
        self.steps_taken: list[int] = []

    def objective(self, step: int) -> dict[str, Loss]:
        self.steps_taken.append(step)
        random = torch.Generator().manual_seed(self.seed * 1000 + step)
        rows = 3 + step % 4
        x, y = torch.randn(rows, 3, generator=random), torch.randn(rows, 2, generator=random)
        first, second, bias = self.parameters.values()
        error = torch.tanh(x @ first.T) @ second.T + bias - y
        return {
            "regression": Loss(error.square().sum(), torch.tensor(2 * rows)),
            "penalty": Loss(first.pow(4).sum() + bias.abs().sum(), torch.tensor(14)),
        }

    def values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters.values()]


class InterruptionError(Exception):
    pass


def interrupted(problem: Problem, at: int) -> Callable[[int], Any]:
    """An objective that fails at a step."""

    def objective(step: int) -> Any:
        if step == at:
            raise InterruptionError
        return problem.objective(step)

    return objective


def make_trainer(problem: Problem, folder: Path | None = None, objective: Any = None, **settings: Any) -> Trainer:
    config = TrainerConfig(
        **{"steps": 20, "learning_rate": 0.05, "warmup_steps": 4, "log_every": 3, "checkpoint_every": 5, **settings}
    )
    return Trainer(
        config, problem.parameters, objective or problem.objective, folder, {"seed": problem.seed}, progress=False
    )


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without the times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds_per_step") > 0 for line in lines)
    return lines


def drawn_seed() -> int:
    return int(torch.randint(10**6, ()))
