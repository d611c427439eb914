"""The plan of a run, made before it starts and without weights: parameters, operations, time, memory or data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gakernels.cost import flops
from gakernels.cost.memory import MemoryEstimate, Recomputation
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
from gakernels.training.run_memory import RunMemory, step_setting


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
        memory: of one process.
        fits: by size of a GPU in 10^9 bytes, what must be recomputed for a step to fit, with one such GPU per process;
            None if it does not fit.
    """

    name: str
    processes: int
    steps: int
    base_parameters: int
    generator_parameters: int
    operations: float
    memory: MemoryEstimate
    fits: Mapping[int, Recomputation | None]

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
    """

    segments: int
    segments_at_once: int
    segment_tokens: int
    windows: int
    flops: StepFlops

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
    batches, dtype = recipe.micro_batches(processes), base_dtype(recipe.model)
    setting = step_setting(recipe, dtype, batches.accumulates, processes, device)
    memory = RunMemory(shape, config, batches.shapes, setting, recipe.memory_budget)
    one = pretraining_flops(shape, config, windows.chunks, config.chunk_size, windows.plain, windows.slices)
    operations = one * windows.batch_size
    return PretrainingPlan(
        name=recipe.model.name,
        processes=processes,
        steps=recipe.trainer.steps,
        segments=windows.batch_size,
        segments_at_once=windows.at_once(processes),
        segment_tokens=recipe.segment_tokens,
        windows=(1 + windows.slices) * windows.chunks,
        base_parameters=shape.parameters,
        generator_parameters=_trained(shape, config),
        operations=operations.total,
        flops=operations,
        memory=memory.estimate(),
        fits=memory.fits(),
    )


def plan_finetuning(
    recipe: FinetuningRecipe, world: int = 1, device: str = "cuda", progress: bool = True
) -> FinetuningPlan:
    """The plan of a run: the data is read and tokenised; no weights are loaded.

    Args:
        recipe: of the run.
        world: number of processes.
        device: `cuda` or `cpu`.
        progress: show bars.

    Raises:
        InputError: the data can't be used, there is no tokenizer or configuration of the base model, settings of the
            recipe contradict each other, or the run does not fit the recipe's memory budget.
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
        data.sources,
        data.weights,
        recipe.batches,
        config.chunk_size,
        seed=recipe.seed,
        ranks=Ranks(0, world),
        rounded=recipe.compile,
    )
    load, micro = batches.load(min(16, steps)), batches.micro_batches(steps)
    setting = step_setting(recipe, base_dtype(base), micro.accumulates, world, device)
    memory = RunMemory(shape, config, micro.shapes, setting, recipe.memory_budget)
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
        memory=memory.estimate(),
        fits=memory.fits(),
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
