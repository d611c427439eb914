"""The training loop: AdamW, warm-up and linear decay, clipping, progress, log, checkpoints."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gakernels.errors import InputError
from gakernels.files import write_text
from gakernels.training.checkpoint import find_checkpoints, load_checkpoint, save_checkpoint
from gakernels.training.objectives import Loss
from gakernels.training.schedule import warmup_then_linear_decay

Objective = Callable[[int], Mapping[str, Loss]]


@dataclass(frozen=True)
class TrainerConfig:
    """How to optimise; the defaults are the paper's for Mistral-7B (appendix B).

    Attributes:
        steps: optimizer steps in all.
        learning_rate: at the end of the warm-up.
        warmup_steps: of the schedule.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        betas: of AdamW.
        loss_weights: factor of each loss by name; 1 for those that are not named, and 0 leaves a loss out.
        log_every: steps between lines of the log; every checkpoint is preceded by one.
        checkpoint_every: steps between checkpoints; the last step always writes one.
        label: shown in front of the progress bar.

    Raises:
        InputError: a value is out of range.
    """

    steps: int
    learning_rate: float = 5e-5
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    loss_weights: tuple[tuple[str, float], ...] = ()
    log_every: int = 10
    checkpoint_every: int = 500
    label: str = "training"

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be above 0, but it is {self.learning_rate}")
        if not self.clip > 0:
            raise InputError(f"clip must be above 0 (infinity for no clipping), but it is {self.clip}")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0, but it is {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be at least 0 and below 1, but they are {self.betas}")


class Trainer:
    """Trains parameters on an objective, in a folder that keeps the log and the checkpoints.

    Args:
        config: how to optimise.
        parameters: what to train, by name.
        objective: takes the number of a step, counted from 0, and returns the losses of its batch. What it does must
            depend on that number alone, so that a run that is resumed equals one that was not interrupted.
        folder: gets `log.jsonl` and `checkpoints/`; None keeps nothing.
        settings: what else the run depends on (data, seed, ...), JSON types; a checkpoint is resumed only by a run
            with equal settings.
        progress: show a progress bar.
    """

    def __init__(
        self,
        config: TrainerConfig,
        parameters: Mapping[str, nn.Parameter],
        objective: Objective,
        folder: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self.config, self.parameters, self.objective = config, dict(parameters), objective
        self.folder, self.progress = folder, progress
        self.settings = {"trainer": asdict(config), **(settings or {})}
        decayed = [parameter for parameter in self.parameters.values() if parameter.dim() > 1]
        others = [parameter for parameter in self.parameters.values() if parameter.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas
        )
        self._history: list[tuple[dict[str, Loss], Tensor]] = []  # losses and gradient norms since the last line

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, from the newest checkpoint of the folder if there is one.

        Returns:
            The lines of the log that this call added.

        Raises:
            InputError: loss_weights names a loss that the objective does not have.
            FormatError: the checkpoint is damaged or belongs to a run with other settings.
            OSError: the log or a checkpoint could not be written.
            FloatingPointError: a loss, gradient or parameter is not finite; no checkpoint holds what came of it.
        """
        first = self._resume()
        lines: list[dict[str, Any]] = []
        started = time.perf_counter()
        with self._bar(first) as bar:
            for step in range(first, self.config.steps):
                self._step(step)
                bar.update()
                done = step + 1
                to_save = done % self.config.checkpoint_every == 0 or done == self.config.steps
                if to_save or done % self.config.log_every == 0:
                    # Also in front of a checkpoint: the sums start anew there, as they do in a run that is resumed.
                    lines.append(self._log(done, started))
                    bar.set_postfix({name: f"{value:.3f}" for name, value in lines[-1]["loss"].items()})
                    started = time.perf_counter()
                if to_save:
                    self._save(done)
        return lines

    def _bar(self, first: int) -> "tqdm[NoReturn]":
        return tqdm(
            total=self.config.steps, initial=first, desc=self.config.label, unit="step", disable=not self.progress
        )

    def _step(self, step: int) -> None:
        rate = self.config.learning_rate * warmup_then_linear_decay(step, self.config.warmup_steps, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.objective(step)
        self.optimizer.zero_grad(set_to_none=True)
        self._total(losses).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        self.optimizer.step()
        detached = {name: Loss(loss.total.detach(), loss.tokens) for name, loss in losses.items()}
        self._history.append((detached, norm))

    def _total(self, losses: Mapping[str, Loss]) -> Tensor:
        """The weighted sum of the means of the losses."""
        weights = dict.fromkeys(losses, 1.0) | dict(self.config.loss_weights)
        if set(weights) != set(losses):
            unknown = ", ".join(sorted(set(weights) - set(losses)))
            raise InputError(f"loss_weights must name losses out of {', '.join(losses)}, but names {unknown}")
        return torch.stack([weights[name] * loss.mean for name, loss in losses.items() if weights[name]]).sum()

    def _log(self, step: int, started: float) -> dict[str, Any]:
        """Write a line about the steps since the last one, which began at the time `started`."""
        self._check_finite(step)
        names = dict.fromkeys(name for losses, _ in self._history for name in losses)
        means = {name: self._mean(name) for name in names}
        line = {
            "step": step,
            "loss": means,
            "perplexity": {name: math.exp(min(mean, 700.0)) for name, mean in means.items()},
            "gradient_norm": self._history[-1][1].item(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds_per_step": (time.perf_counter() - started) / len(self._history),
        }
        self._history.clear()
        if self.folder:
            _append(self.folder / "log.jsonl", json.dumps(line))
        return line

    def _mean(self, name: str) -> float:
        losses = [losses[name] for losses, _ in self._history if name in losses]
        tokens = torch.stack([loss.tokens for loss in losses]).sum()
        return (torch.stack([loss.total for loss in losses]).sum() / tokens.clamp(min=1)).item()

    def _check_finite(self, step: int) -> None:
        """Look at the steps since the last line, all at once: a look at each step would slow a GPU."""
        finite = torch.stack([_is_finite(losses, norm) for losses, norm in self._history]).tolist()
        if all(finite):
            return
        losses = self._history[finite.index(False)][0]
        names = [f"loss {name!r}" for name, loss in losses.items() if not loss.total.isfinite()] or ["gradient"]
        bad = step - len(finite) + 1 + finite.index(False)
        raise FloatingPointError(
            f"training stopped: the {names[0]} of step {bad} is not finite; a lower learning rate may help"
        )

    def _save(self, step: int) -> None:
        for name, parameter in self.parameters.items():
            if not parameter.isfinite().all():
                raise FloatingPointError(f"training stopped: {name} is not finite after step {step}")
        if self.folder:
            save_checkpoint(self.folder / "checkpoints", step, self.parameters, self.optimizer, self.settings)

    def _resume(self) -> int:
        """Load the newest checkpoint, cut the log back to it, and return the step to go on with."""
        self._history.clear()
        if self.folder is None:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoints = find_checkpoints(self.folder / "checkpoints")
        if not checkpoints:
            _cut_log(self.folder / "log.jsonl", 0)
            return 0
        step = load_checkpoint(checkpoints[-1], self.parameters, self.optimizer, self.settings)
        _cut_log(self.folder / "log.jsonl", step)
        return step


def _is_finite(losses: Mapping[str, Loss], norm: Tensor) -> Tensor:
    return torch.stack([norm.isfinite(), *(loss.total.isfinite() for loss in losses.values())]).all()


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _cut_log(path: Path, step: int) -> None:
    """Drop the lines after a step, which an interrupted run wrote and the resumed one will write again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # a line that was cut off while it was written
