"""A small problem to train on: two layers, two losses, batches that depend on the step."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gakernels.model.window_losses import Loss
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
    plan = {"steps": 20, "learning_rate": 0.05, "warmup_steps": 4, "log_every": 3, "checkpoint_every": 5}
    noisy = {"spike_factor": math.inf}  # three to six rows in a batch
    config = TrainerConfig(**{**plan, **noisy, **settings})
    return Trainer(
        config, problem.parameters, objective or problem.objective, folder, {"seed": problem.seed}, progress=False
    )


MEASURED = ("seconds_per_step", "peak_bytes", "tokens_per_second", "mfu")


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without what is measured."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(line["seconds_per_step"] > 0 and line["peak_bytes"] > 0 for line in lines)
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def drawn_seed() -> int:
    return int(torch.randint(10**6, ()))
