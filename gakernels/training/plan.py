"""The plan of a run, made before it starts and without weights: parameters, operations, time, memory or data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gakernels.cost import flops
from gakernels.cost.memory import (
    MemoryEstimate,
    Recomputation,
    StepSetting,
    StepShape,
    choose_recomputation,
    estimate_memory,
    parse_bytes,
)
from gakernels.cost.shapes import ModelShape
from gakernels.cost.step_flops import StepFlops, pretraining_flops
from gakernels.cost.step_memory import generator_parameters
from gakernels.distributed import Ranks
from gakernels.errors import InputError, first_line
from gakernels.files import entry, read_description
from gakernels.model import GENERATOR_FILE, locate
from gakernels.model.base_model import model_source
from gakernels.model.config import GeneratorConfig
from gakernels.model.hub import local_folder
from gakernels.training.base_model import BaseConfig, base_dtype, base_shape
from gakernels.training.instruction.recipe import FinetuningRecipe
from gakernels.training.instruction.steps import InstructionSteps, StepLoad
from gakernels.training.instruction.tuning_data import TuningData, load_tuning_data
from gakernels.training.pretraining_recipe import PretrainingRecipe

GPU_GIGABYTES = (24, 48, 80, 141)  # 10^9 bytes: RTX 4090, L40S, A100 and H100, H200
RESERVED = 1.5e9  # bytes of a GPU that the CUDA context and libraries take
QUANTIZED_BYTES = {"fp8": 2.0, "int8": 1.0, "nf4": 0.5}  # per weight; fp8 is stored in both layouts


@dataclass(frozen=True)
class RunPlan:
    """The common part of both kinds of plans.

    Attributes:
        name: of the base model.
        processes: number of processes of the run.
        steps: optimizer steps.
        base_parameters: number of frozen parameters.
        generator_parameters: number of trained parameters.
        operations: floating-point operations of a step, all processes together.
    """

    name: str
    processes: int
    steps: int
    base_parameters: int
    generator_parameters: int
    operations: float

    def seconds(self, tflops: float) -> float:
        """The time of the run if each process computes this many 10^12 operations per second."""
        return self.steps * self.operations / (tflops * 1e12 * self.processes)


@dataclass(frozen=True)
class PretrainingPlan(RunPlan):
    """The result of `plan_pretraining`.

    Attributes:
        segments: segments in a step, over all processes.
        segments_at_once: segments that go through the model together on one process.
        segment_tokens: T * M.
        windows: windows of a segment, context and reconstruction together.
        flops: the operations of a step, by their kind.
        memory: of one process.
        fits: by size of a GPU in 10^9 bytes, what must be recomputed for a step to fit, with one such GPU per process;
            None if it does not fit.
    """

    segments: int
    segments_at_once: int
    segment_tokens: int
    windows: int
    flops: StepFlops
    memory: MemoryEstimate
    fits: Mapping[int, Recomputation | None]

    @property
    def tokens(self) -> int:
        """The segment tokens of the whole run."""
        return self.steps * self.segments * self.segment_tokens

    def tokens_per_second(self, tflops: float) -> float:
        """Segment tokens per second, over all processes, at that rate."""
        return self.tokens / self.seconds(tflops)


@dataclass(frozen=True)
class FinetuningPlan(RunPlan):
    """The result of `plan_finetuning`; operations are counted as for pretraining windows: slightly too many.

    Attributes:
        data: the data as read.
        contexts: contexts in a step, over all processes.
        load: tokens, positions and passes of a step.
    """

    data: TuningData
    contexts: int
    load: StepLoad

    @property
    def rounds(self) -> float:
        """The number of passes over all contexts."""
        return self.steps * self.contexts / self.data.contexts


def plan_pretraining(recipe: PretrainingRecipe, processes: int = 1, device: str = "cuda") -> PretrainingPlan:
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
    setting = step_setting(recipe, processes, device)
    step = largest_step(recipe, shape, at_once, setting)
    one = pretraining_flops(shape, config, windows.chunks, config.chunk_size, windows.plain, windows.slices)
    operations = one * windows.batch_size
    return PretrainingPlan(
        name=recipe.model.name,
        processes=processes,
        steps=recipe.trainer.steps,
        segments=windows.batch_size,
        segments_at_once=at_once,
        segment_tokens=recipe.segment_tokens,
        windows=(1 + windows.slices) * windows.chunks,
        base_parameters=shape.parameters,
        generator_parameters=_trained(shape, config),
        operations=operations.total,
        flops=operations,
        memory=_memory(recipe, shape, step, setting),
        fits=_fits(recipe, shape, at_once, processes),
    )


def _memory(recipe: PretrainingRecipe, shape: ModelShape, step: StepShape, setting: StepSetting) -> MemoryEstimate:
    if recipe.memory_budget is None:
        return estimate_memory(shape, recipe.generator, step, setting)
    return choose_recomputation(shape, recipe.generator, step, parse_bytes(recipe.memory_budget), setting)


def _fits(
    recipe: PretrainingRecipe, shape: ModelShape, at_once: int, processes: int
) -> dict[int, Recomputation | None]:
    setting = step_setting(recipe, processes, "cuda")
    step = largest_step(recipe, shape, at_once, setting)
    fits: dict[int, Recomputation | None] = {}
    for size in GPU_GIGABYTES:
        try:
            estimate = choose_recomputation(shape, recipe.generator, step, int(size * 1e9 - RESERVED), setting)
        except InputError:
            fits[size] = None
        else:
            fits[size] = estimate.recomputed
    return fits


def largest_step(recipe: PretrainingRecipe, shape: ModelShape, at_once: int, setting: StepSetting) -> StepShape:
    """The windows of the micro-batch that takes the most memory: segments, or chunks that are separate contexts."""
    size, chunks, slices = recipe.generator.chunk_size, recipe.windows.chunks, recipe.windows.slices
    steps = [StepShape.pretraining(at_once, size, chunks, slices)]
    if recipe.windows.single_share:
        steps.append(StepShape.pretraining(at_once * chunks, size, 1, slices))
    return max(steps, key=lambda step: estimate_memory(shape, recipe.generator, step, setting).total)


def step_setting(recipe: PretrainingRecipe, world: int, device: str, dtype: torch.dtype | None = None) -> StepSetting:
    """How a recipe runs a step: what its memory depends on; `dtype` is that of the base model, if it is loaded."""
    dtype, quantization = dtype or base_dtype(recipe.model), recipe.model.quantization
    return StepSetting(
        dtype=dtype,
        autocast=recipe.trainer.precision != "float32",
        linear_bytes=None if quantization is None else QUANTIZED_BYTES[quantization],
        shards=world if recipe.parallel == "shards" else 1,
        accumulates=recipe.windows.batch_size // world > recipe.windows.at_once(world),
        device=device,
    )


def plan_finetuning(recipe: FinetuningRecipe, world: int = 1, progress: bool = True) -> FinetuningPlan:
    """The plan of a run: the data is read and tokenised; no weights are loaded.

    Args:
        recipe: of the run.
        world: number of processes.
        progress: show bars.

    Raises:
        InputError: the data can't be used, there is no tokenizer or configuration of the base model, or settings of
            the recipe contradict each other.
    """
    base, config = _models(recipe)
    shape = base_shape(base)
    data = load_tuning_data(
        recipe.data,
        _tokenizer(base.name),
        shape.vocabulary,
        recipe.batches.window or config.chunk_size,
        recipe.evaluation.contexts,
        recipe.seed,
        progress,
        recipe.moment,
    )
    steps = recipe.steps(data.contexts)
    batches = InstructionSteps(
        data.sources, data.weights, recipe.batches, config.chunk_size, seed=recipe.seed, ranks=Ranks(0, world)
    )
    load = batches.load(min(16, steps))
    segment = pretraining_flops(shape, config, 8, config.chunk_size)
    return FinetuningPlan(
        name=base.name,
        processes=world,
        data=data,
        steps=steps,
        contexts=recipe.batches.batch_size,
        load=load,
        base_parameters=shape.parameters,
        generator_parameters=_trained(shape, config),
        operations=segment.total * load.positions / (16 * config.chunk_size),
    )


def _models(recipe: FinetuningRecipe) -> tuple[BaseConfig, GeneratorConfig]:
    """The base model and the generator's settings, by name or from the generator that the run starts from."""
    if recipe.start is None:
        assert recipe.model is not None
        return recipe.model, recipe.generator or GeneratorConfig()
    folder = local_folder(recipe.start)
    path = folder / GENERATOR_FILE
    description = read_description(path, "generator")
    config = GeneratorConfig.from_dict(entry(path, description, "config", dict))
    name = locate(folder, entry(path, description, "base_name", str))
    return recipe.model or BaseConfig(name), config


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**model_source(name))
    except Exception as error:  # the package tokenizers raises nothing narrower
        raise InputError(f"the tokenizer of {name!r} can't be loaded: {first_line(error)}") from error
    return tokenizer


def _trained(shape: ModelShape, config: GeneratorConfig) -> int:
    """The number of parameters of the generators."""
    each = sum(generator_parameters(config, shape.hidden, linear) for linear in flops.adapted_linears(shape, config))
    return each * len(flops.adapted_layers(shape, config))
