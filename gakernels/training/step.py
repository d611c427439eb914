"""One optimizer step: micro-batches, gradients of all processes, clipping, guard, AdamW."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gakernels.distributed import Parallel
from gakernels.errors import InputError
from gakernels.model.window_losses import Loss
from gakernels.training.guard import StepGuard
from gakernels.training.objective import Objective, as_objective
from gakernels.training.randomness import seed_step
from gakernels.training.schedule import learning_rate_factor
from gakernels.training.sharding import whole
from gakernels.training.trainer_config import PRECISIONS, TrainerConfig


@dataclass(frozen=True)
class StepResult:
    """What a step gave, still on the device.

    Attributes:
        totals: (losses,) float64, negative log-likelihood over all processes, in the order of the losses' names.
        tokens: (losses,) float64, target tokens.
        norm: of the gradient, before clipping.
        bad: 1.0 where the guard skipped the step, else 0.0.
    """

    totals: Tensor
    tokens: Tensor
    norm: Tensor
    bad: Tensor

    def numbers(self) -> list[float]:
        """All of it on the host: totals, tokens, norm, bad."""
        rest = torch.stack([self.norm.double(), self.bad.double()])
        values: list[float] = torch.cat([self.totals, self.tokens, rest]).tolist()
        return values


class TrainingStep:
    """The steps of a run. Nothing in a step waits for the device.

    Args:
        config: how to optimise.
        parameters: what to train, by name.
        objective: see `Objective`; or a function from the number of a step to the losses of its batch.
        parallel: the processes.

    Attributes:
        names: of the losses, once a step has run.
        learning_rate: of the last step, for parameters with a factor of 1.
    """

    def __init__(
        self,
        config: TrainerConfig,
        parameters: Mapping[str, nn.Parameter],
        objective: Objective[Any] | Callable[[int], Mapping[str, Loss]],
        parallel: Parallel,
    ) -> None:
        if not parameters:
            raise InputError("parameters must be at least one, but there is none")
        self._config, self._parallel = config, parallel
        self.objective = objective
        self.names: tuple[str, ...] = ()
        self.learning_rate = 0.0
        self._parameters = list(parameters.values())
        self.device = self._parameters[0].device
        groups = parameter_groups(parameters, config)
        self._factors = [group.pop("factor") for group in groups]
        # Fused: one pass over the memory, and on the device it can be told to do nothing.
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        self.guard = StepGuard(self.device, config.spike_factor)
        parallel.prepare(parameters)

    def __call__(self, number: int) -> StepResult:
        """Forward, backward and update of the step of that number, counted from 0.

        Raises:
            InputError: loss_weights names a loss that the objective does not have, or there is no micro-batch.
        """
        objective = as_objective(self.objective)
        seed_step(self._config.seed, number, self._parallel.ranks.rank)
        self._set_rates(number)
        with self._autocast():
            batches = objective.batches(number)
            tokens = self._count([objective.target_counts(batch) for batch in batches], number)
        divisors = {name: count.clamp(min=1) for name, count in tokens.items()}
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(len(tokens), dtype=torch.float64, device=self.device)
        for place, batch in enumerate(batches):
            with self._autocast():
                losses = objective.losses(batch)
                loss = self._weighted(losses, divisors)
            self._parallel.backward(loss, last=place == len(batches) - 1)
            totals += torch.stack([losses[name].total.detach().double() for name in tokens])
        self._parallel.finish()
        return self._update(
            self._parallel.sum(totals), torch.stack([count.to(totals, non_blocking=True) for count in tokens.values()])
        )

    def _set_rates(self, number: int) -> None:
        config = self._config
        factor = learning_rate_factor(config.schedule, number, config.warmup_steps, config.steps)
        self.learning_rate = config.learning_rate * factor
        for group, factor in zip(self.optimizer.param_groups, self._factors, strict=True):
            group["lr"] = self.learning_rate * factor

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self._config.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _count(self, counts: Sequence[Mapping[str, int | Tensor]], number: int) -> dict[str, Tensor]:
        """Target tokens of each loss over all micro-batches and processes."""
        if not counts:
            raise InputError(f"objective must give at least one micro-batch for each step, but step {number} has none")
        if tuple(counts[0]) != self.names:
            self.names = tuple(counts[0])
            self._check_weights()
        sums = [torch.stack([torch.as_tensor(count[name]) for count in counts]).sum() for name in self.names]
        if self._parallel.ranks.world > 1:  # on the host: no GPU is waited for
            sums = list(self._parallel.sum(torch.stack([value.cpu().long() for value in sums])))
        return dict(zip(self.names, sums, strict=True))

    def _check_weights(self) -> None:
        unknown = sorted(set(dict(self._config.loss_weights)) - set(self.names))
        if unknown:
            raise InputError(
                f"loss_weights must name losses out of {', '.join(self.names)}, but names {', '.join(unknown)}"
            )
        if not any(self._weight(name) for name in self.names):
            raise InputError("loss_weights must leave a loss to train on, but all are 0")

    def _weight(self, name: str) -> float:
        return dict(self._config.loss_weights).get(name, 1.0)

    def _weighted(self, losses: Mapping[str, Loss], divisors: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the losses of a micro-batch, each over its target tokens in the whole step."""
        parts = [
            self._weight(name) * (losses[name].total / divisors[name]) for name in self.names if self._weight(name)
        ]
        return torch.stack(parts).sum()

    def _update(self, totals: Tensor, tokens: Tensor) -> StepResult:
        norm = whole(nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))
        weights = torch.tensor([self._weight(name) for name in self.names], dtype=torch.float64).to(
            self.device, non_blocking=True
        )
        used = torch.where(weights == 0, 0.0, totals)  # a loss that is left out may be anything
        bad = self.guard.judge((weights * used / tokens.clamp(min=1)).sum(), norm)
        nn.utils.clip_grads_with_norm_(self._parameters, self._config.clip, norm)
        self.optimizer.found_inf = bad  # type: ignore[attr-defined] # as torch.amp.GradScaler tells AdamW
        self.optimizer.step()
        return StepResult(totals, tokens, norm, bad)


def parameter_groups(parameters: Mapping[str, nn.Parameter], config: TrainerConfig) -> list[dict[str, Any]]:
    """Groups for AdamW by weight decay and by factor of the learning rate (`factor`).

    Raises:
        InputError: a pattern fits no parameter.
    """
    for pattern, _ in config.learning_rate_factors:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in parameters):
            raise InputError(f"learning_rate_factors: {pattern!r} fits none of the parameters, as {min(parameters)}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((decay, _factor(name, config)), []).append(parameter)
    return [{"params": group, "weight_decay": decay, "factor": factor} for (decay, factor), group in groups.items()]


def _factor(name: str, config: TrainerConfig) -> float:
    fitting = (factor for pattern, factor in config.learning_rate_factors if fnmatch.fnmatchcase(name, pattern))
    return next(fitting, 1.0)
