"""Options of the commands that run a recipe: --config, --set, --dry-run, and flags for single settings."""

import argparse
from pathlib import Path
from typing import Any, TypeVar

import torch

from gakernels.distributed import Ranks
from gakernels.errors import InputError
from gakernels.paths import user_path
from gakernels.training.base_model import DTYPES
from gakernels.training.recipes import load_recipe

Recipe = TypeVar("Recipe")
_SETTING = "recipe: "


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add --config, --set, --dry-run, --processes and --tflops."""
    recipe = parser.add_argument_group("recipe (docs/training.md)")
    recipe.add_argument(
        "--config", type=user_path, help="YAML file, or the name of a recipe that comes with the package"
    )
    recipe.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="one setting, which overrides the file and other options; can be repeated",
    )
    recipe.add_argument(
        "--dry-run", action="store_true", help="print the plan (parameters, memory, operations, time) and stop"
    )
    recipe.add_argument("--processes", type=int, help="processes in the plan (default: as started by torchrun, or 1)")
    recipe.add_argument("--tflops", type=float, help="10^12 operations per second of one process, for the plan's time")


def add_setting(group: argparse._ActionsContainer, option: str, settings: str, text: str, **details: Any) -> None:
    """Add an option that sets settings of the recipe.

    Args:
        group: receives the option.
        option: its name.
        settings: dotted names of the settings, separated by spaces.
        text: its help.
        details: see `ArgumentParser.add_argument`.
    """
    if not details.keys() & {"action", "choices"}:
        details["metavar"] = option.lstrip("-").upper().replace("-", "_")
    group.add_argument(option, dest=_SETTING + settings, default=None, help=text, **details)


def add_optimisation_options(group: argparse._ArgumentGroup, seeds: str) -> None:
    """Add --learning-rate, --warmup-steps, --weight-decay, and --seed for the given settings."""
    add_setting(group, "--learning-rate", "trainer.learning_rate", "default: 5e-5", type=float)
    add_setting(group, "--warmup-steps", "trainer.warmup_steps", "default: 100", type=int)
    add_setting(group, "--weight-decay", "trainer.weight_decay", "default: 0.01", type=float)
    add_setting(group, "--seed", seeds, "default: 0", type=int)


def add_log_options(group: argparse._ArgumentGroup) -> None:
    """Add --log-every, --evaluate-every and --checkpoint-every."""
    add_setting(group, "--log-every", "trainer.log_every", "steps between log lines (default: 10)", type=int)
    add_setting(
        group,
        "--evaluate-every",
        "trainer.evaluate_every",
        "steps between evaluations (default: only at the end)",
        type=int,
    )
    add_setting(
        group, "--checkpoint-every", "trainer.checkpoint_every", "steps between checkpoints (default: 500)", type=int
    )


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Add --device and --dtype."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add_setting(
        parser,
        "--dtype",
        "model.dtype",
        "dtype of the base model that --model names (default: its own)",
        choices=DTYPES,
    )


def output_of(options: argparse.Namespace) -> Path:
    """The folder of the run.

    Raises:
        InputError: none is given, or it is a file.
    """
    if options.output is None:
        raise InputError("--output is needed: the folder for generator, log, checkpoints and report")
    folder: Path = options.output
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output must be a folder, but {folder} is a file")
    return folder


def recipe_of(kind: type[Recipe], options: argparse.Namespace) -> Recipe:
    """The recipe from the options: the file, then those of `add_setting`, then --set.

    Raises:
        InputError: see `load_recipe`.
    """
    given = [(name, value) for name, value in vars(options).items() if name.startswith(_SETTING) and value is not None]
    flags = {key: value for name, value in given for key in name.removeprefix(_SETTING).split()}
    return load_recipe(kind, options.config, options.set, flags)


def planned_processes(options: argparse.Namespace) -> int:
    """The number of processes of a plan.

    Raises:
        InputError: --processes or --tflops is not above 0.
    """
    for name in ("processes", "tflops"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name} must be above 0, but it is {value}")
    return options.processes or Ranks.from_environment().world
