"""The memory of the steps of a run, on its own device and on GPUs of the usual sizes, without running them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gakernels.cost.memory import (
    MemoryEstimate,
    Recomputation,
    StepSetting,
    StepShape,
    choose_recomputation,
    estimate_memory,
    largest_step,
    parse_bytes,
)
from gakernels.cost.shapes import ModelShape
from gakernels.errors import InputError
from gakernels.model.config import GeneratorConfig
from gakernels.training.run_recipe import WholeRecipe

GPU_GIGABYTES = (24, 48, 80, 141)  # 10^9 bytes: RTX 4090, L40S, A100 and H100, H200
RESERVED = 1.5e9  # bytes of a GPU that the CUDA context and libraries take
QUANTIZED_BYTES = {"fp8": 2.0, "int8": 1.0, "nf4": 0.5}  # per weight; fp8 is stored in both layouts


@dataclass(frozen=True)
class RunMemory:
    """The memory of a process.

    Attributes:
        shape: of the base model.
        config: of the generators.
        steps: what can go through the model at once.
        setting: how a step is run.
        budget: the recipe's `memory_budget`.
    """

    shape: ModelShape
    config: GeneratorConfig
    steps: Sequence[StepShape]
    setting: StepSetting
    budget: str | None

    def estimate(self) -> MemoryEstimate:
        """That of the largest step, within the budget.

        Raises:
            InputError: the step does not fit the budget.
        """
        if self.budget is not None:
            return choose_recomputation(self.shape, self.config, self.steps, parse_bytes(self.budget), self.setting)
        step = largest_step(self.shape, self.config, self.steps, self.setting)
        return estimate_memory(self.shape, self.config, step, self.setting)

    def fits(self) -> dict[int, Recomputation | None]:
        """By size of a GPU in 10^9 bytes, what must be recomputed for a step to fit; None if it does not fit."""
        setting = replace(self.setting, device="cuda")
        fits: dict[int, Recomputation | None] = {}
        for size in GPU_GIGABYTES:
            budget = int(size * 1e9 - RESERVED)
            try:
                fits[size] = choose_recomputation(self.shape, self.config, self.steps, budget, setting).recomputed
            except InputError:
                fits[size] = None
        return fits


def step_setting(recipe: WholeRecipe, dtype: torch.dtype, accumulates: bool, world: int, device: str) -> StepSetting:
    """How a recipe runs a step.

    Args:
        recipe: of the run.
        dtype: of the base model.
        accumulates: see `MicroBatches`.
        world: number of processes.
        device: `cuda` or `cpu`.
    """
    quantization = None if recipe.model is None else recipe.model.quantization
    return StepSetting(
        dtype=dtype,
        autocast=recipe.trainer.precision != "float32",
        linear_bytes=None if quantization is None else QUANTIZED_BYTES[quantization],
        shards=world if recipe.parallel == "shards" else 1,
        accumulates=accumulates,
        device=device,
    )
