"""What a run of instruction tuning will take, before it starts and without weights."""

from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gakernels.cost import flops
from gakernels.cost.step_flops import pretraining_flops
from gakernels.cost.step_memory import generator_parameters
from gakernels.distributed import Ranks
from gakernels.errors import InputError, first_line
from gakernels.files import entry, read_description
from gakernels.model import GENERATOR_FILE, locate
from gakernels.model.config import GeneratorConfig
from gakernels.model.hub import local_folder
from gakernels.training.base_model import BaseConfig, base_shape
from gakernels.training.instruction.finetuning import tuning_steps
from gakernels.training.instruction.recipe import FinetuningRecipe
from gakernels.training.instruction.steps import StepLoad
from gakernels.training.instruction.tuning_data import TuningData, load_tuning_data


@dataclass(frozen=True)
class TuningPlan:
    """What `plan_finetuning` found.

    Attributes:
        name: of the base model.
        processes: of the run.
        data: what was read.
        steps: optimizer steps.
        contexts: in a step, all processes together.
        load: tokens, positions and passes of a step.
        base_parameters: frozen.
        generator_parameters: trained.
        flops: of a step, as if all positions were those of pretraining windows: a little too many.
    """

    name: str
    processes: int
    data: TuningData
    steps: int
    contexts: int
    load: StepLoad
    base_parameters: int
    generator_parameters: int
    flops: float

    @property
    def rounds(self) -> float:
        """How often all contexts are gone through."""
        return self.steps * self.contexts / self.data.contexts

    def seconds(self, tflops: float) -> float:
        """The time of the run if each process computes so many 10^12 operations a second."""
        return self.steps * self.flops / (tflops * 1e12 * self.processes)


def plan_finetuning(recipe: FinetuningRecipe, world: int = 1, progress: bool = True) -> TuningPlan:
    """The plan of a run: its data is read and tokenised, no weights are loaded.

    Args:
        recipe: of the run.
        world: number of processes.
        progress: show bars.

    Raises:
        InputError: the data can't be used, there is no tokenizer or configuration of the base model, or something in
            the recipe does not go together.
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
    load = tuning_steps(recipe, data, config.chunk_size, ranks=Ranks(0, world)).load(min(16, steps))
    segment = pretraining_flops(shape, config, 8, config.chunk_size)
    each = sum(generator_parameters(config, shape.hidden, linear) for linear in flops.adapted_linears(shape, config))
    return TuningPlan(
        name=base.name,
        processes=world,
        data=data,
        steps=steps,
        contexts=recipe.batches.batch_size,
        load=load,
        base_parameters=shape.parameters,
        generator_parameters=each * len(flops.adapted_layers(shape, config)),
        flops=segment.total * load.positions / (16 * config.chunk_size),
    )


def _models(recipe: FinetuningRecipe) -> tuple[BaseConfig, GeneratorConfig]:
    """The base model and the generator's settings, by name or out of the generator that the run starts from."""
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
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the package tokenizers raises nothing narrower
        raise InputError(f"the tokenizer of {name!r} can't be loaded: {first_line(error)}") from error
    return tokenizer
