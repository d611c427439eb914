"""What runs that train generators share: their processes, their precision, and what they leave in their folder."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from gakernels.distributed import Parallel, Ranks, Replicas
from gakernels.files import write_text
from gakernels.model import GenerativeAdapter
from gakernels.training.recipes import recipe_text
from gakernels.training.sharding import Shards
from gakernels.training.trainer_config import PRECISIONS, TrainerConfig

RECIPE_FILE, REPORT_FILE = "recipe.yaml", "report.json"


class RunRecipe(Protocol):
    """What all recipes of such runs have."""

    @property
    def trainer(self) -> TrainerConfig: ...

    @property
    def parallel(self) -> str: ...


class GeneratorRun(Protocol):
    """A run with a model, a recipe, a folder and its processes."""

    @property
    def model(self) -> GenerativeAdapter: ...

    @property
    def recipe(self) -> RunRecipe: ...

    @property
    def folder(self) -> Path: ...

    @property
    def ranks(self) -> Ranks: ...


def processes_of(run: GeneratorRun) -> Parallel:
    """How the processes work together. Shards divide the model here, so this comes before its parameters are used."""
    if run.ranks.world == 1:
        return Parallel()
    return Shards(run.ranks, run.model) if run.recipe.parallel == "shards" else Replicas(run.ranks)


def precision_of(run: GeneratorRun) -> AbstractContextManager[Any]:
    """The autocast of the recipe's precision."""
    dtype = PRECISIONS[run.recipe.trainer.precision]
    return nullcontext() if dtype is None else torch.autocast(run.model.device.type, dtype=dtype)


def save_generators(run: GeneratorRun) -> None:
    """The first process writes; where the generators are sharded, all of them take part in gathering."""
    if run.ranks.rank == 0:
        run.model.save_pretrained(run.folder)
    elif run.recipe.parallel == "shards":
        run.model.generator_tensors()


def write_recipe(run: GeneratorRun) -> None:
    """`recipe.yaml`, by the first process."""
    if run.ranks.rank == 0:
        write_text(run.folder / RECIPE_FILE, recipe_text(run.recipe))
