"""The step of the library's own `Trainer`, without its files, for the benchmark of training steps."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gakernels.model.window_losses import Loss, WindowBatch
from gakernels.training.objective import WindowObjective
from gakernels.training.trainer import Trainer, TrainerConfig

LEARNING_RATE = 1e-6  # the parameters hardly move: every step is like the first
CLIP = 1.0


class TrainerStep:
    """Takes steps on the batches that it is handed.

    Args:
        parameters: what is trained, by name.
        take: the losses of a batch; there is one.
        dtype: of the base model; bfloat16 runs under autocast.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        take: Callable[[WindowBatch], Mapping[str, Loss]],
        dtype: torch.dtype,
    ) -> None:
        self._batches: list[WindowBatch] = []
        precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
        config = TrainerConfig(1, LEARNING_RATE, 0, "constant", clip=CLIP, precision=precision)
        self._trainer = Trainer(config, parameters, WindowObjective(lambda _: self._batches, take), progress=False)
        self._taken = 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the trainer."""
        return self._trainer.optimizer

    def __call__(self, batch: WindowBatch) -> Tensor:
        """One step; gives the loss."""
        self._batches = [batch]
        result = self._trainer.step(self._taken)
        self._taken += 1
        return (result.totals / result.tokens)[0]

    def gradients(self, batch: WindowBatch) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and the gradients that a step forms, as they are before clipping; the parameters stay."""
        parameters = list(self._trainer.parameters.values())
        before = [parameter.detach().clone() for parameter in parameters]
        self._batches = [batch]
        result = self._trainer.step(0)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        clipped = (CLIP / (result.norm + 1e-6)).clamp(max=1.0)
        found = [None if parameter.grad is None else parameter.grad / clipped for parameter in parameters]
        return (result.totals / result.tokens)[0], found
