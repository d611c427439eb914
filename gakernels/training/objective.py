"""The objective of a run: the micro-batches of a step, their weights, and their losses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from gakernels.model.window_losses import Loss, WindowBatch, count_targets

Batch = TypeVar("Batch")


class Objective(Protocol[Batch]):
    """A run's objective; the result of a step must depend only on its number (and seed, rank and world size).

    The loss of a step is, for each name, the sum of `Loss.total` over all its micro-batches on all processes over the
    sum of their target tokens. So the number of processes and micro-batches changes only rounding.
    """

    def batches(self, step: int) -> Sequence[Batch]:
        """The micro-batches of this process for an optimizer step, counted from 0.

        If the model is sharded, every process must return the same number.
        """
        ...

    def target_counts(self, batch: Batch) -> Mapping[str, int | Tensor]:
        """The number of target tokens of each loss, without a forward: the same names in every micro-batch."""
        ...

    def losses(self, batch: Batch) -> Mapping[str, Loss]:
        """The losses of a micro-batch, under those names."""
        ...


@dataclass(frozen=True)
class WindowObjective:
    """Windows of a model with adapters.

    Attributes:
        windows: a function from the number of a step to its micro-batches.
        take: a function from a micro-batch to its losses, for instance `window_losses` of a model.
    """

    windows: Callable[[int], Sequence[WindowBatch]]
    take: Callable[[WindowBatch], Mapping[str, Loss]]

    def batches(self, step: int) -> Sequence[WindowBatch]:
        """See `Objective`."""
        return self.windows(step)

    def target_counts(self, batch: WindowBatch) -> Mapping[str, int | Tensor]:
        """See `Objective`."""
        return count_targets(batch)

    def losses(self, batch: WindowBatch) -> Mapping[str, Loss]:
        """See `Objective`."""
        return self.take(batch)


@dataclass(frozen=True)
class StepFunction:
    """An objective given by a function from the number of a step to the losses of its only micro-batch.

    The losses serve as the batch, so the forward pass has run before the targets are counted.
    """

    function: Callable[[int], Mapping[str, Loss]]

    def batches(self, step: int) -> Sequence[Mapping[str, Loss]]:
        """See `Objective`."""
        return [self.function(step)]

    def target_counts(self, batch: Mapping[str, Loss]) -> Mapping[str, int | Tensor]:
        """See `Objective`."""
        return {name: loss.tokens for name, loss in batch.items()}

    def losses(self, batch: Mapping[str, Loss]) -> Mapping[str, Loss]:
        """See `Objective`."""
        return batch


def as_objective(objective: Objective[Any] | Callable[[int], Mapping[str, Loss]]) -> Objective[Any]:
    """The objective itself, or a function as a `StepFunction`."""
    return StepFunction(objective) if callable(objective) else objective
