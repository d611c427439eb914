"""The recipe of instruction tuning: everything that a run depends on."""

import math
from collections.abc import Mapping
from dataclasses import field
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator

from gakernels.data.chat import parse_clock
from gakernels.data.instruction_sources import InstructionSource
from gakernels.errors import InputError
from gakernels.model.config import GeneratorConfig
from gakernels.settings import AtLeastTwo, Count, Flag, PathText, Positive, Seed, settings
from gakernels.training.base_model import BaseConfig
from gakernels.training.instruction.steps import BatchConfig
from gakernels.training.run_recipe import RunRecipe
from gakernels.training.trainer_config import TrainerConfig

MOST_STEPS = 2**31


@settings
class InstructionDataConfig:
    """What a generator is tuned on (docs/training.md).

    The held-out contexts come from `held_out_path` if it is given, else from the end of each source.

    Attributes:
        path: the only source: a file or folder of JSON lines, JSON or Parquet, or `hub:` and the name of a data set.
        sources: or several sources, by name.
        held_out_path: a source for the held-out contexts alone.
        chat_template: Jinja template that writes conversations; None for the one that the generator in `start` was
            tuned with, else the tokenizer's, else a plain one. It is stored with the generator.
        context_tokens: longer contexts are left out.
        strict: a record that can't be used is an error; if not, such records are counted and reported.
        allow_skipped: train on what is left, even if more than 5% of a source's rows can't be used.

    Raises:
        InputError: there is neither a path nor sources, or both, a limit is below 2, or skipped records are both
            allowed and an error.
    """

    path: PathText | None = None
    sources: Mapping[str, InstructionSource] = field(default_factory=dict)
    held_out_path: PathText | None = None
    chat_template: str | None = None
    context_tokens: AtLeastTwo = 8192
    strict: Flag = False
    allow_skipped: Flag = False

    def __post_init__(self) -> None:
        if self.strict and self.allow_skipped:
            raise InputError("data.strict and data.allow_skipped must not both be true")
        if (self.path is None) == (not self.sources):
            raise InputError("data must have either a path or sources")

    def all_sources(self) -> Mapping[str, InstructionSource]:
        """The sources by name, even if there is only a path."""
        return self.sources if self.path is None else {"data": InstructionSource(self.path)}


@settings
class FinetuningTrainerConfig(TrainerConfig):
    """How to optimise, see `TrainerConfig`; the number of steps follows from `epochs` unless it is given."""

    steps: Count = MOST_STEPS


@settings
class AnswerEvaluationConfig:
    """What is scored during a run and at its end (`score_answers`).

    Attributes:
        contexts: held-out contexts, with all their conversations.
        contexts_at_intervals: how many of them are scored every `trainer.evaluate_every` steps.
        batch_size: contexts in one pass.

    Raises:
        InputError: a value is below 2.
    """

    contexts: AtLeastTwo = 32
    contexts_at_intervals: AtLeastTwo = 8
    batch_size: AtLeastTwo = 4


def _checked_clock(text: str) -> str:
    parse_clock(text)
    return text


@settings
class FinetuningRecipe(RunRecipe):
    """Everything that a run of instruction tuning depends on, beside `RunRecipe`.

    Attributes:
        data: what it reads.
        start: folder or hub name of the generator to start from; None starts with untrained ones.
        model: the base model; with `start`, None means the one that the generator names.
        generator: what is adapted, and the generators' sizes; only without `start`.
        batches: contexts and conversations of a step.
        epochs: passes over all contexts; the run ends after `trainer.steps` if that is earlier.
        trainer: how it optimises, and what it logs and keeps.
        evaluation: what is scored.
        seed: of all random draws.
        clock: the time that the chat template shows, if it shows one, as 2026-01-31T12:00:00; None for the time at
            which the run begins. The recipe in the run's folder records it, and a resumed run keeps it.

    Raises:
        InputError: a value is out of range, or two contradict each other.
    """

    data: InstructionDataConfig
    start: PathText | None = None
    model: BaseConfig | None = None
    generator: GeneratorConfig | None = None
    batches: BatchConfig = field(default_factory=BatchConfig)
    epochs: Positive = 2.0
    trainer: FinetuningTrainerConfig = field(default_factory=FinetuningTrainerConfig)
    evaluation: AnswerEvaluationConfig = field(default_factory=AnswerEvaluationConfig)
    seed: Seed = 0
    clock: Annotated[str, AfterValidator(_checked_clock)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is None and self.model is None:
            raise InputError("model.name is needed if there is no generator to start from (start)")
        if self.start is not None and self.generator is not None:
            raise InputError("generator must not be given with start: its settings are those of the generator there")

    @property
    def moment(self) -> datetime | None:
        """The clock."""
        return None if self.clock is None else parse_clock(self.clock)

    def steps(self, contexts: int) -> int:
        """The number of optimizer steps of a run over so many contexts."""
        return min(self.trainer.steps, max(1, math.ceil(self.epochs * contexts / self.batches.batch_size)))
