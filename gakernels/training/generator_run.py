"""A training run for the generators of a model, in a folder: shared by pretraining and instruction tuning."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from gakernels.cost.memory import fit_memory_budget, parse_bytes
from gakernels.distributed import Parallel, Ranks, Replicas
from gakernels.files import write_text
from gakernels.model import GenerativeAdapter
from gakernels.model.compilation import compiled_layers
from gakernels.training.base_model import BaseConfig, load_base_model
from gakernels.training.checkpoint import find_checkpoints
from gakernels.training.objective import Objective
from gakernels.training.recipes import recipe_text
from gakernels.training.run_log import StepCost
from gakernels.training.run_memory import step_setting
from gakernels.training.run_recipe import MicroBatches, WholeRecipe
from gakernels.training.sharding import Shards
from gakernels.training.trainer import Trainer
from gakernels.training.trainer_config import TrainerConfig

RECIPE_FILE, REPORT_FILE = "recipe.yaml", "report.json"


Recipe = TypeVar("Recipe", bound=WholeRecipe)


def generator_on(start: str, config: BaseConfig, device: torch.device | str) -> GenerativeAdapter:
    """A saved generator on the base model of a recipe.

    Raises:
        InputError: one of them can't be loaded.
        FormatError: the generator is damaged or belongs to another base model.
        BackendError: the device can't compute with weights of the recipe's quantization.
    """
    base, tokenizer = load_base_model(config, device)
    return GenerativeAdapter.from_pretrained(start, base=base, tokenizer=tokenizer)


@dataclass(frozen=True)
class GeneratorRun(Generic[Recipe]):
    """One run and its folder.

    Attributes:
        model: the base model with its generators.
        recipe: everything else that the run depends on.
        folder: receives `recipe.yaml`, `log.jsonl`, `checkpoints/`, the generator and `report.json`.
        progress: whether this process shows progress bars.
        ranks: this process among all processes of the run.
    """

    model: GenerativeAdapter
    recipe: Recipe
    folder: Path
    progress: bool
    ranks: Ranks

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.ranks.rank == 0

    def train_generators(
        self,
        config: TrainerConfig,
        objective: Objective[Any],
        settings: Mapping[str, Any],
        evaluate: Callable[[], Mapping[str, Any]],
        cost: StepCost,
        micro_batches: Callable[[], MicroBatches],
    ) -> None:
        """Train the generators, from the newest checkpoint if any, and write them; see `Trainer` for the arguments."""
        self._set_recomputation(micro_batches)
        if self.recipe.overlap:
            self.model.overlap_generators()
        with compiled_layers(self.model.base) if self.recipe.compile else nullcontext():
            parallel = self._processes()  # before the parameters are read: it may shard them
            parameters = dict(self.model.generators.named_parameters())
            trainer = Trainer(
                config, parameters, objective, self.folder, settings, self.progress, parallel, evaluate, cost
            )
            if not find_checkpoints(self.folder / "checkpoints"):
                self._write(RECIPE_FILE, recipe_text(self.recipe))
            trainer.run()
        self._save_generators()
        self._write(RECIPE_FILE, recipe_text(self.recipe))  # again: a resumed run may have some other settings

    def write_report(self, values: Mapping[str, Any]) -> None:
        """Write `report.json` from values of JSON types."""
        self._write(REPORT_FILE, json.dumps(values, indent=2) + "\n")

    def _set_recomputation(self, micro_batches: Callable[[], MicroBatches]) -> None:
        """Make layers recompute what the recipe's memory budget asks for."""
        if self.recipe.memory_budget is not None:
            batches, dtype = micro_batches(), self.model.base.dtype
            setting = step_setting(self.recipe, dtype, batches.accumulates, self.ranks.world, self.model.device.type)
            fit_memory_budget(self.model, batches.shapes, parse_bytes(self.recipe.memory_budget), setting)

    def _processes(self) -> Parallel:
        if self.ranks.world == 1:
            return Parallel()
        return Shards(self.ranks, self.model) if self.recipe.parallel == "shards" else Replicas(self.ranks)

    def _save_generators(self) -> None:
        """The first process writes; if the generators are sharded, all processes take part in gathering."""
        if self.leads:
            self.model.save_pretrained(self.folder)
        elif self.recipe.parallel == "shards":
            self.model.generator_tensors()

    def _write(self, name: str, text: str) -> None:
        if self.leads:
            write_text(self.folder / name, text)
