"""TrainerConfig: how a run optimises, and what it writes when."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from gakernels.errors import InputError
from gakernels.training.run_log import REPORTS

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
# Settings that change nothing of what is computed: a run may be resumed with others.
OUTER_SETTINGS = ("keep_checkpoints", "reports", "peak_tflops", "label")


@dataclass(frozen=True)
class TrainerConfig:
    """How to optimise; the defaults are the paper's for Mistral-7B (appendix B).

    Attributes:
        steps: optimizer steps in all.
        learning_rate: at the end of the warm-up; AdamW moves every parameter by about that much in a step.
        warmup_steps: of the schedule.
        schedule: what follows the warm-up: `linear`, `cosine` or `constant`.
        learning_rate_factors: pairs of a pattern of parameter names (`*` for anything) and a factor of their learning
            rate; the first that fits counts.
        weight_decay: of AdamW, on parameters with two or more dimensions.
        clip: largest norm of the gradient.
        betas: of AdamW.
        loss_weights: factor of each loss by name; 1 for those that are not named, and 0 leaves a loss out.
        precision: `bfloat16` runs forward and backward under autocast; parameters and optimizer keep their dtype.
        spike_factor: a step whose loss is above so many times the median of recent losses is skipped; infinity: none.
        most_skipped: so many skipped steps in a row end the run.
        seed: of what an objective draws from the global random generators.
        log_every: steps between lines of the log.
        evaluate_every: steps between evaluations, where there is one; None: never.
        checkpoint_every: steps between checkpoints; the last step always writes one.
        keep_checkpoints: how many of the newest stay.
        reports: `tensorboard`, `wandb`: where the numbers of the log go besides.
        peak_tflops: of one device, for MFU; known for some GPUs if not given.
        label: shown in front of the progress bar.

    Raises:
        InputError: a value is out of range.
    """

    steps: int
    learning_rate: float = 5e-5
    warmup_steps: int = 100
    schedule: str = "linear"
    learning_rate_factors: tuple[tuple[str, float], ...] = ()
    weight_decay: float = 0.01
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    loss_weights: tuple[tuple[str, float], ...] = ()
    precision: str = "float32"
    spike_factor: float = 5.0
    most_skipped: int = 10
    seed: int = 0
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    reports: tuple[str, ...] = ()
    peak_tflops: float | None = None
    label: str = "training"

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "most_skipped", "evaluate_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        if not 0 < self.learning_rate <= 1:
            raise InputError(f"learning_rate must be above 0 and at most 1, but it is {self.learning_rate}")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise InputError(f"peak_tflops must be above 0, but it is {self.peak_tflops}")
        if not self.clip > 0:
            raise InputError(f"clip must be above 0 (infinity for no clipping), but it is {self.clip}")
        if not self.spike_factor > 1:
            raise InputError(f"spike_factor must be above 1 (infinity for no limit), but it is {self.spike_factor}")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0, but it is {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be at least 0 and below 1, but they are {self.betas}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be between 0 and 2^32 - 1, but it is {self.seed}")
        for setting in ("learning_rate_factors", "loss_weights"):
            for name, factor in getattr(self, setting):
                if not 0 <= factor < math.inf:
                    raise InputError(f"{setting} must be at least 0, but that of {name!r} is {factor}")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, but it is {getattr(self, name)!r}")
        for report in self.reports:
            if report not in REPORTS:
                raise InputError(f"reports must be out of {', '.join(REPORTS)}, but has {report!r}")

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """What forward passes run under."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
