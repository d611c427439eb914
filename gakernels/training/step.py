"""One optimizer step: learning rate, random numbers, micro-batches, gradient reduction, clipping, guard, AdamW."""

import fnmatch
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gakernels.distributed import Parallel
from gakernels.errors import InputError
from gakernels.model.window_losses import Loss
from gakernels.training.objective import Objective, as_objective
from gakernels.training.sharding import whole
from gakernels.training.trainer_config import Schedule, TrainerConfig


@dataclass(frozen=True)
class StepResult:
    """The result of a step, still on the device.

    Attributes:
        totals: (losses,) float64, negative log-likelihood over all processes, in the order of the losses' names.
        tokens: (losses,) float64, target tokens.
        norm: of the gradient, before clipping.
        bad: 1.0 if the guard skipped the step, else 0.0.
    """

    totals: Tensor
    tokens: Tensor
    norm: Tensor
    bad: Tensor

    def numbers(self) -> list[float]:
        """All values, on the host: totals, tokens, norm, bad."""
        rest = torch.stack([self.norm.double(), self.bad.double()])
        values: list[float] = torch.cat([self.totals, self.tokens, rest]).tolist()
        return values


class TrainingStep:
    """Takes the steps of a run. A step never waits for the device.

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
        # Fused: one pass over the memory, and a tensor on the device can tell it to skip the update.
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        self.guard = StepGuard(self.device, config.spike_factor)
        parallel.prepare(parameters)

    def __call__(self, number: int) -> StepResult:
        """Run forward, backward and update of a step; `number` counts from 0.

        Raises:
            InputError: loss_weights names a loss that the objective does not have, or there is no micro-batch.
        """
        objective = as_objective(self.objective)
        seed_step(self._config.seed, number, self._parallel.ranks.rank)
        self._set_rates(number)
        with self._config.autocast(self.device):
            batches = objective.batches(number)
            tokens = self._count([objective.target_counts(batch) for batch in batches], number)
        divisors = {name: count.clamp(min=1) for name, count in tokens.items()}
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(len(tokens), dtype=torch.float64, device=self.device)
        for place, batch in enumerate(batches):
            with self._config.autocast(self.device):
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

    def _count(self, counts: Sequence[Mapping[str, int | Tensor]], number: int) -> dict[str, Tensor]:
        """The target tokens of each loss over all micro-batches and processes."""
        if not counts:
            raise InputError(f"objective must give at least one micro-batch for each step, but step {number} has none")
        if tuple(counts[0]) != self.names:
            self.names = tuple(counts[0])
            self._check_weights()
        sums = [torch.stack([torch.as_tensor(count[name]) for count in counts]).sum() for name in self.names]
        if self._parallel.ranks.world > 1:  # on the host, so as not to wait for the GPU
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
        """The weighted sum of the losses of a micro-batch, each divided by its target tokens in the whole step."""
        parts = [
            self._weight(name) * (losses[name].total / divisors[name]) for name in self.names if self._weight(name)
        ]
        return torch.stack(parts).sum()

    def _update(self, totals: Tensor, tokens: Tensor) -> StepResult:
        norm = whole(nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))
        weights = torch.tensor([self._weight(name) for name in self.names], dtype=torch.float64).to(
            self.device, non_blocking=True
        )
        used = torch.where(weights == 0, 0.0, totals)  # a loss that is left out may have any value
        bad = self.guard.judge((weights * used / tokens.clamp(min=1)).sum(), norm)
        nn.utils.clip_grads_with_norm_(self._parameters, self._config.clip, norm)
        self.optimizer.found_inf = bad  # type: ignore[attr-defined] # as torch.amp.GradScaler tells AdamW
        self.optimizer.step()
        return StepResult(totals, tokens, norm, bad)


def parameter_groups(parameters: Mapping[str, nn.Parameter], config: TrainerConfig) -> list[dict[str, Any]]:
    """Groups for AdamW by weight decay and by factor of the learning rate (`factor`).

    Raises:
        InputError: a pattern matches no parameter.
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


RECENT, LEAST = 64, 16  # how many losses the median is taken over, and the least number of them


class StepGuard:
    """Decides about each step on the device, where AdamW reads the decision, so that nothing waits for it.

    A step is bad if its loss or gradient norm is not finite, or if the loss is above `spike_factor` times the median of
    the last 64 losses of good steps, once there are 16.
    """

    def __init__(self, device: torch.device, spike_factor: float = math.inf) -> None:
        self._factor = spike_factor
        self._recent = torch.full((RECENT,), math.nan, device=device)
        self._good = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 for a bad step and 0.0 for a good one (a tensor), judged by its loss and gradient norm."""
        loss = loss.to(self._recent.dtype)
        spike = (loss > self._factor * self._recent.nanmedian()) & (self._good >= LEAST)
        bad = spike | ~(loss.isfinite() & norm.isfinite())
        place = (self._good % RECENT)[None]
        self._recent.index_copy_(0, place, torch.where(bad, self._recent[place], loss))
        self._good += ~bad
        return bad.float()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps; a resumed run writes into them."""
        return {"recent": self._recent, "good": self._good}


@dataclass
class SkippedSteps:
    """The guard's decisions on the host; on a GPU without that of the newest step, so that nothing waits for it."""

    in_a_row: int = 0
    _pending: list[tuple[int, Tensor, "torch.cuda.Event | None"]] = field(default_factory=list)

    def add(self, step: int, bad: Tensor) -> None:
        """Start fetching the decision about a step."""
        if bad.device.type != "cuda":
            self._pending.append((step, bad, None))
            return
        host = torch.empty((), pin_memory=True)
        host.copy_(bad, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, host, event))

    def read(self, all_of_them: bool = False) -> list[int]:
        """The bad steps among those decided since the last call."""
        late = 1 if self._pending and self._pending[-1][2] is not None and not all_of_them else 0
        ready, self._pending = self._pending[: len(self._pending) - late], self._pending[len(self._pending) - late :]
        skipped = []
        for step, bad, event in ready:
            if event is not None:
                event.synchronize()
            self.in_a_row = self.in_a_row + 1 if bad.item() else 0
            if self.in_a_row:
                skipped.append(step)
        return skipped


def culprit(losses: Mapping[str, float], norm: float) -> str:
    """A description of what was wrong with a bad step."""
    names = [f"loss {name!r}" for name, value in losses.items() if not math.isfinite(value)]
    if names:
        return f"the {names[0]} is not finite"
    return "the loss is far above those before it" if math.isfinite(norm) else "the gradient is not finite"


def learning_rate_factor(schedule: str, step: int, warmup_steps: int, total_steps: int) -> float:
    """The factor of the learning rate at a step, counted from 0.

    The first step already learns: its factor is 1 / warmup_steps. After the warm-up the factor falls to zero along a
    straight line (`linear`, the paper's schedule, appendix B) or half a cosine (`cosine`), or stays (`constant`).

    Raises:
        InputError: there is no schedule of that name.
    """
    if schedule not in get_args(Schedule):
        raise InputError(f"schedule must be one of {', '.join(get_args(Schedule))}, but it is {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return left
    return (1 - math.cos(math.pi * left)) / 2 if schedule == "cosine" else 1.0


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global generators, so that the random numbers of a step depend only on these three numbers."""
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@contextmanager
def random_kept(device: torch.device) -> Iterator[None]:
    """Restore the global generators after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
