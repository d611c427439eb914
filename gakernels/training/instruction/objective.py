"""The objective of instruction tuning: answers under the adapters of their contexts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gakernels.model import GenerativeAdapter
from gakernels.model.window_losses import Loss
from gakernels.training.instruction.batches import InstructionBatch, count_answers
from gakernels.training.instruction.losses import instruction_losses
from gakernels.training.instruction.steps import InstructionSteps


@dataclass(frozen=True)
class InstructionObjective:
    """Losses of conversations about contexts, an `Objective`.

    Attributes:
        model: generators with their base.
        steps: what each step has.
    """

    model: GenerativeAdapter
    steps: InstructionSteps

    def batches(self, step: int) -> Sequence[InstructionBatch]:
        """See `Objective`: equally many on every process."""
        return self.steps.batches(step)

    def target_counts(self, batch: InstructionBatch) -> Mapping[str, int | Tensor]:
        """See `Objective`."""
        return count_answers(batch)

    def losses(self, batch: InstructionBatch) -> Mapping[str, Loss]:
        """See `Objective`."""
        return instruction_losses(self.model, batch)
