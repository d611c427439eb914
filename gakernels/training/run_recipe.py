"""What the recipes of pretraining and of instruction tuning have in common: how a step runs on its devices."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gakernels.cost.memory import StepShape, parse_bytes
from gakernels.errors import InputError
from gakernels.settings import Flag, settings
from gakernels.training.base_model import BaseConfig
from gakernels.training.trainer_config import Processes, TrainerConfig


@dataclass(frozen=True)
class MicroBatches:
    """What goes through the model of one process at once.

    Attributes:
        shapes: of micro-batches; none is as large as another in every respect.
        accumulates: whether a step has several.
    """

    shapes: Sequence[StepShape]
    accumulates: bool


@settings
class RunRecipe:
    """How the steps of a run are run; none of it changes the results by more than rounding.

    Attributes:
        parallel: with several processes, `replicas` (each has the whole model) or `shards` (FSDP2).
        memory_budget: of a GPU, such as `80GB`: as many layers as needed to stay below it recompute gate and up, or
            everything, in the backward; None for no limit.
        overlap: form the adapters of a layer on a second stream of the GPU (`GenerativeAdapter.overlap_generators`);
            not with `shards`.
        compile: compile the decoder layers while training (`model.compilation.compile_layers`).

    Raises:
        InputError: a value is out of range, or two contradict each other.
    """

    parallel: Processes = field(default="replicas", kw_only=True)
    memory_budget: str | None = field(default=None, kw_only=True)
    overlap: Flag = field(default=False, kw_only=True)
    compile: Flag = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.overlap and self.parallel == "shards":
            raise InputError("overlap must be false with parallel: shards, whose weights come and go during a step")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)


class WholeRecipe(Protocol):
    """What a run reads of its recipe, whatever it trains on."""

    @property
    def model(self) -> BaseConfig | None: ...

    @property
    def trainer(self) -> TrainerConfig: ...

    @property
    def parallel(self) -> Processes: ...

    @property
    def memory_budget(self) -> str | None: ...

    @property
    def overlap(self) -> bool: ...

    @property
    def compile(self) -> bool: ...
