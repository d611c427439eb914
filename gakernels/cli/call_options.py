"""Options that select the model and generators of a command, and the calls of the operations that these make."""

import argparse
from dataclasses import replace

from transformers import AutoConfig, PreTrainedConfig

from gakernels.cost.shapes import SHAPES
from gakernels.errors import InputError, first_line
from gakernels.model.base_model import model_source
from gakernels.paths import user_path
from gakernels.training.base_model import BaseConfig, base_dtype, base_shape
from gakernels.training.planned_calls import Call, PlannedCalls, llama_config
from gakernels.training.pretraining_recipe import PretrainingRecipe
from gakernels.training.recipes import load_recipe
from gakernels.training.trainer_config import PRECISIONS

CHUNKS, USERS = (1, 8, 64), (1, 8, 64)


def add_call_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, --config and --set."""
    names = ", ".join(SHAPES)
    parser.add_argument("--model", help=f"base model: a folder, a hub name, or one of {names}")
    parser.add_argument(
        "--config", type=user_path, help="pretraining recipe: a YAML file, or the name of a recipe of the package"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="one setting of the recipe, such as generator.state_size=256; can be repeated",
    )


def recipe_of_calls(options: argparse.Namespace) -> PretrainingRecipe:
    """The recipe from --config, --model and --set, in bfloat16 unless they say otherwise.

    Raises:
        InputError: see `load_recipe`.
    """
    overrides = []
    if options.config is None:
        overrides = ["data.path=.", "model.dtype=bfloat16", "trainer.precision=bfloat16", "trainer.steps=1"]
        overrides += ["generator.linears=o_proj,down_proj"]
    name = options.model or (None if options.config else "mistral-7b")
    if name is not None:
        overrides.append(f"model.name={name}")
    recipe = load_recipe(PretrainingRecipe, options.config, [*overrides, *options.set])
    if name in SHAPES:
        return replace(recipe, model=replace(recipe.model, shape=name))
    return replace(recipe, model=replace(recipe.model, shape=None)) if name else recipe


def planned_calls(recipe: PretrainingRecipe) -> dict[str, list[Call]]:
    """The calls of a training step, of contexts that become adapters, and of decoding.

    Raises:
        InputError: the base model's configuration can't be read, or the generators do not fit it.
    """
    plan = PlannedCalls(
        _configuration(recipe.model),
        recipe.generator,
        base_dtype(recipe.model),
        PRECISIONS[recipe.trainer.precision],
    )
    segments, windows = recipe.windows.at_once(1), recipe.windows
    training = f"training, {_count(segments, 'segment')} of {_count(windows.chunks, 'chunk')} at once"
    calls = {training: plan.training(segments, windows.chunks, windows.slices)}
    for chunks in CHUNKS:
        calls[f"a context of {_count(chunks, 'chunk')}"] = plan.contextualizing(chunks)
    for users in USERS:
        calls[f"decoding, {_count(users, 'user')}"] = plan.decoding(users)
    return calls


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _configuration(model: BaseConfig) -> PreTrainedConfig:
    if model.shape is not None:
        return llama_config(base_shape(model))
    try:
        return AutoConfig.from_pretrained(**model_source(model.name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--model must be a folder or hub name of a model, or one of {', '.join(SHAPES)}, but the configuration of "
            f"{model.name!r} can't be read: {first_line(error)}"
        ) from error
