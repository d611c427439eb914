"""What a run will take, before it starts and without its weights: parameters, memory, operations, time."""

from __future__ import annotations

from dataclasses import dataclass

from gakernels.cost import flops
from gakernels.cost.memory import (
    MemoryEstimate,
    StepSetting,
    StepShape,
    choose_recomputation,
    estimate_memory,
    parse_bytes,
)
from gakernels.cost.shapes import ModelShape
from gakernels.cost.step_flops import StepFlops, pretraining_flops
from gakernels.cost.step_memory import generator_parameters
from gakernels.training.base_model import DTYPES, base_shape
from gakernels.training.pretraining_recipe import PretrainingRecipe

QUANTIZED_BYTES = {"fp8": 2.0, "int8": 1.0, "nf4": 0.5}  # of a weight; fp8 is kept in both layouts


@dataclass(frozen=True)
class Plan:
    """What `plan_pretraining` found.

    Attributes:
        name: of the base model.
        processes: of the run.
        steps: optimizer steps.
        segments: in a step, all processes together.
        segments_at_once: that go through the model together on one process.
        segment_tokens: T * M.
        windows: of a segment, context and reconstruction together.
        base_parameters: frozen.
        generator_parameters: trained.
        flops: of a step, all processes together.
        memory: of one process.
    """

    name: str
    processes: int
    steps: int
    segments: int
    segments_at_once: int
    segment_tokens: int
    windows: int
    base_parameters: int
    generator_parameters: int
    flops: StepFlops
    memory: MemoryEstimate

    @property
    def tokens(self) -> int:
        """Segment tokens of the whole run."""
        return self.steps * self.segments * self.segment_tokens

    def seconds(self, tflops: float) -> float:
        """The time of the run if each process computes so many 10^12 operations a second."""
        return self.steps * self.flops.total / (tflops * 1e12 * self.processes)

    def tokens_per_second(self, tflops: float) -> float:
        """Segment tokens a second, all processes together, at that rate."""
        return self.tokens / self.seconds(tflops)


def plan_pretraining(recipe: PretrainingRecipe, processes: int = 1, device: str = "cuda") -> Plan:
    """The plan of a run, from shapes alone.

    Args:
        recipe: of the run.
        processes: of the run.
        device: `cuda` or `cpu`.

    Raises:
        InputError: the base model's configuration can't be read, the generator does not fit it, the processes do not
            divide the batch, or the run does not fit the recipe's memory budget.
    """
    shape, config, windows = base_shape(recipe.model), recipe.generator, recipe.windows
    at_once = windows.at_once(processes)
    one = pretraining_flops(shape, config, windows.chunks, config.chunk_size, windows.plain, windows.slices)
    linears = flops.adapted_linears(shape, config)
    each = sum(generator_parameters(config, shape.hidden, linear) for linear in linears)
    return Plan(
        name=recipe.model.name,
        processes=processes,
        steps=recipe.trainer.steps,
        segments=windows.batch_size,
        segments_at_once=at_once,
        segment_tokens=recipe.segment_tokens,
        windows=(1 + windows.slices) * windows.chunks,
        base_parameters=shape.parameters,
        generator_parameters=each * len(flops.adapted_layers(shape, config)),
        flops=one * windows.batch_size,
        memory=_memory(recipe, shape, at_once, processes, device),
    )


def _memory(recipe: PretrainingRecipe, shape: ModelShape, at_once: int, world: int, device: str) -> MemoryEstimate:
    setting = step_setting(recipe, world, device)
    step = largest_step(recipe, shape, at_once, setting)
    if recipe.memory_budget is None:
        return estimate_memory(shape, recipe.generator, step, setting)
    return choose_recomputation(shape, recipe.generator, step, parse_bytes(recipe.memory_budget), setting)


def largest_step(recipe: PretrainingRecipe, shape: ModelShape, at_once: int, setting: StepSetting) -> StepShape:
    """The windows of the micro-batch that takes the most memory: segments, or chunks that are contexts of their own."""
    size, chunks, slices = recipe.generator.chunk_size, recipe.windows.chunks, recipe.windows.slices
    steps = [StepShape.pretraining(at_once, size, chunks, slices)]
    if recipe.windows.single_share:
        steps.append(StepShape.pretraining(at_once * chunks, size, 1, slices))
    return max(steps, key=lambda step: estimate_memory(shape, recipe.generator, step, setting).total)


def step_setting(recipe: PretrainingRecipe, world: int, device: str) -> StepSetting:
    """How a recipe's step is run, as far as its memory depends on it."""
    dtype, quantization = DTYPES[recipe.model.dtype], recipe.model.quantization
    return StepSetting(
        dtype=dtype,
        autocast=recipe.trainer.precision != "float32",
        linear_bytes=None if quantization is None else QUANTIZED_BYTES[quantization],
        shards=world if recipe.parallel == "shards" else 1,
        accumulates=recipe.windows.batch_size // world > recipe.windows.at_once(world),
        device=device,
    )
