"""The recipe of a pretraining run: everything that it depends on."""

from dataclasses import field
from typing import Annotated

from pydantic import Field

from gakernels.cost.memory import StepShape
from gakernels.errors import InputError
from gakernels.model.config import GeneratorConfig
from gakernels.model.window_losses import RECONSTRUCTIONS, check_slices
from gakernels.settings import AtLeastTwo, Count, Flag, Int, Number, PathText, Seed, one_of, settings
from gakernels.training.base_model import BaseConfig
from gakernels.training.distillation import Distillation
from gakernels.training.pretraining_data import DataConfig
from gakernels.training.run_recipe import MicroBatches, RunRecipe
from gakernels.training.trainer_config import TrainerConfig


@settings
class WindowsConfig:
    """How segments become windows, and how many go into a step.

    Attributes:
        chunks: T, context chunks in a segment (8 in the paper).
        reconstruction: see `window_losses.pretraining_windows`.
        slices: reconstruction windows for each adapter; 0 for completion alone.
        batch_size: segments in a step, over all processes.
        single_share: for this share of the steps, at the start, every chunk is its own segment (T = 1, as many tokens
            per step), so the model learns the content of one chunk before it learns to keep several apart.
        plain: the first chunk, which has no context, carries a loss too, named `plain`; it teaches the static term.
        segments_at_once: segments that go through the model together on one process; gradients of several groups are
            added. None: a process's whole share of the batch.

    Raises:
        InputError: a value is out of range.
    """

    chunks: Count = 8
    reconstruction: Annotated[str, one_of(RECONSTRUCTIONS)] = "random_slice"
    slices: Int = 1
    batch_size: Count = 8
    single_share: Annotated[Number, Field(ge=0, le=1)] = 0.0
    plain: Flag = False
    segments_at_once: Count | None = None

    def __post_init__(self) -> None:
        check_slices(self.slices, 1 if self.single_share else self.chunks, self.reconstruction)

    def at_once(self, world: int) -> int:
        """Segments of a micro-batch.

        Raises:
            InputError: the processes do not divide the batch, or the micro-batches do not divide a process's share.
        """
        if self.batch_size % world:
            raise InputError(
                f"batch_size must be a multiple of the number of processes, {world}, but it is {self.batch_size}"
            )
        part = self.batch_size // world
        size = part if self.segments_at_once is None else self.segments_at_once
        if part % size:
            raise InputError(
                f"segments_at_once must divide the {part} segments of a process's part of the batch, but it is {size}"
            )
        return size


@settings
class EvaluationConfig:
    """What is scored during a run and at its end (`training.perplexity`).

    Attributes:
        contexts: held-out contexts of the report at the end; the continuation of each has as many tokens.
        context_chunks: chunks of a context; None for as many as a segment has.
        contexts_at_intervals: how many of them are scored every `trainer.evaluate_every` steps.
        batch_size: contexts in one pass.
        static_lora: also train the control that sees no context, with the same budget.

    Raises:
        InputError: a value is out of range.
    """

    contexts: AtLeastTwo = 32
    context_chunks: Count | None = None
    contexts_at_intervals: AtLeastTwo = 8
    batch_size: Count = 4
    static_lora: Flag = False


@settings
class PretrainingRecipe(RunRecipe):
    """Everything that a pretraining run depends on, beside `RunRecipe`; docs/training.md has the names in a file.

    Attributes:
        model: the base model.
        data: what it reads.
        trainer: how it optimises, and what it logs and keeps.
        generator: what is adapted, and the generators' sizes.
        start: folder or hub name of a generator to continue training, whose settings must be those of `generator`,
            except for chunk_size and seed; None starts with untrained ones.
        windows: segments, windows and batches.
        evaluation: what is scored.
        seed: of the order of the segments and of the slices.
        distillation: also learn from the base model with the context in its prompt (docs/training.md); None turns it
            off.

    Raises:
        InputError: a value is out of range, or a chunk has no token to predict.
    """

    model: BaseConfig
    data: DataConfig
    trainer: TrainerConfig
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    start: PathText | None = None
    windows: WindowsConfig = field(default_factory=WindowsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: Seed = 0
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generator.chunk_size < 2:
            size = self.generator.chunk_size
            raise InputError(f"chunk_size must be at least 2 to train on next tokens, but it is {size}")
        if self.windows.plain and not self.generator.static_rank:
            raise InputError("windows.plain needs a generator.static_rank above 0: nothing else could learn from it")
        if self.evaluation.static_lora and not any(dict(self.trainer.loss_weights).get(n, 1.0) for n in self._losses()):
            raise InputError(
                "evaluation.static_lora needs a loss of the text, but trainer.loss_weights leaves out "
                + ", ".join(self._losses())
            )

    def _losses(self) -> list[str]:
        """The losses of the text itself."""
        there = {"reconstruction": True, "completion": self.windows.chunks > 1, "plain": self.windows.plain}
        return [name for name, is_there in there.items() if is_there]

    def micro_batches(self, world: int) -> MicroBatches:
        """Segments, or chunks that are separate contexts.

        Raises:
            InputError: see `WindowsConfig.at_once`.
        """
        windows, size = self.windows, self.generator.chunk_size
        rows = windows.at_once(world)
        kinds = [(rows, windows.chunks), *([(rows * windows.chunks, 1)] if windows.single_share else [])]
        shapes = [StepShape.pretraining(count, size, chunks, windows.slices) for count, chunks in kinds]
        return MicroBatches(shapes, windows.batch_size // world > rows)

    @property
    def segment_tokens(self) -> int:
        """T * M."""
        return self.windows.chunks * self.generator.chunk_size

    @property
    def context_chunks(self) -> int:
        """The number of chunks of a held-out context."""
        return self.evaluation.context_chunks or self.windows.chunks
