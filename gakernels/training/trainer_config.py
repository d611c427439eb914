"""TrainerConfig: how a run optimises, and when it writes what."""

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from gakernels.settings import AtLeastZero, Count, Number, Positive, Seed, Weight, Weights, one_of, settings
from gakernels.training.run_log import REPORTS

Schedule = Literal["linear", "cosine", "constant"]
Processes = Literal["replicas", "shards"]  # each with the whole model, or with a part of it (FSDP2)
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
Beta = Annotated[Number, Field(ge=0, lt=1)]
# Settings that do not change the results: a run may be resumed with other values.
OUTER_SETTINGS = ("keep_checkpoints", "reports", "peak_tflops", "label")


@settings
class TrainerConfig:
    """How to optimise; the defaults are the paper's for Mistral-7B (appendix B).

    Attributes:
        steps: optimizer steps in all.
        learning_rate: at the end of the warm-up; AdamW moves every parameter by about that much per step.
        warmup_steps: length of the warm-up.
        schedule: what follows the warm-up: `linear`, `cosine` or `constant`.
        learning_rate_factors: pairs of a pattern of parameter names (`*` for anything) and a factor of their learning
            rate; the first that matches counts.
        weight_decay: of AdamW, on parameters with two or more dimensions.
        clip: largest norm of the gradient.
        betas: of AdamW.
        loss_weights: factor of each loss by name; 1 for losses that are not named; 0 leaves a loss out.
        precision: `bfloat16` runs forward and backward under autocast; parameters and optimizer keep their dtype.
        spike_factor: a step whose loss is above this many times the median of recent losses is skipped; infinity:
            never.
        most_skipped: this many skipped steps in a row end the run.
        seed: of the draws of an objective from the global random generators.
        log_every: steps between lines of the log.
        evaluate_every: steps between evaluations, if there are any; None: never.
        checkpoint_every: steps between checkpoints; the last step always writes one.
        keep_checkpoints: how many of the newest stay.
        reports: `tensorboard`, `wandb`: further destinations for the numbers of the log.
        peak_tflops: of one device, for MFU; by default known for some GPUs.
        label: shown before the progress bar.

    Raises:
        InputError: a value is out of range.
    """

    steps: Count
    learning_rate: Annotated[Number, Field(gt=0, le=1)] = 5e-5
    warmup_steps: AtLeastZero = 100
    schedule: Schedule = "linear"
    learning_rate_factors: Weights = ()
    weight_decay: Weight = 0.01
    clip: Annotated[Number, Field(gt=0)] = 1.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    loss_weights: Weights = ()
    precision: Annotated[str, one_of(PRECISIONS)] = "float32"
    spike_factor: Annotated[Number, Field(gt=1)] = 5.0
    most_skipped: Count = 10
    seed: Seed = 0
    log_every: Count = 10
    evaluate_every: Count | None = None
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2
    reports: tuple[Annotated[str, one_of(REPORTS)], ...] = ()
    peak_tflops: Positive | None = None
    label: str = "training"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which forward passes run."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
