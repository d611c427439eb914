"""Options of the commands that run a recipe: --config, --set, --dry-run, and flags that stand for single settings."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from gakernels.cli.common import DTYPES
from gakernels.distributed import Ranks
from gakernels.errors import InputError
from gakernels.paths import user_path
from gakernels.training.recipes import load_recipe

Recipe = TypeVar("Recipe")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """--config, --set, --dry-run, --processes and --tflops."""
    recipe = parser.add_argument_group("recipe (docs/training.md)")
    recipe.add_argument(
        "--config", type=user_path, help="YAML file, or the name of a recipe that comes with the package"
    )
    recipe.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="one setting, over those of the file and of other options; can be given many times",
    )
    recipe.add_argument(
        "--dry-run", action="store_true", help="print the plan (parameters, memory, operations, time) and stop"
    )
    recipe.add_argument("--processes", type=int, help="of the plan (default: those that torchrun started, or 1)")
    recipe.add_argument("--tflops", type=float, help="10^12 operations a second of one process, for the plan's time")


def add_optimisation_options(group: argparse._ArgumentGroup) -> None:
    """--learning-rate, --warmup-steps, --weight-decay and --seed."""
    group.add_argument("--learning-rate", type=float, help="default: 5e-5")
    group.add_argument("--warmup-steps", type=int, help="default: 100")
    group.add_argument("--weight-decay", type=float, help="default: 0.01")
    group.add_argument("--seed", type=int, help="default: 0")


def add_log_options(group: argparse._ArgumentGroup) -> None:
    """--log-every, --evaluate-every and --checkpoint-every."""
    group.add_argument("--log-every", type=int, help="steps (default: 10)")
    group.add_argument("--evaluate-every", type=int, help="steps between evaluations (default: only at the end)")
    group.add_argument("--checkpoint-every", type=int, help="steps (default: 500)")


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base model that --model names (default: float32)")


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


def recipe_of(kind: type[Recipe], options: argparse.Namespace, flags: Mapping[str, Sequence[str]]) -> Recipe:
    """The recipe that the options give: the file, then flags, then --set.

    Args:
        kind: the recipe's class.
        options: the parsed command line.
        flags: for each option, by its name there, the settings that it stands for.

    Raises:
        InputError: see `load_recipe`.
    """
    given = {name: getattr(options, name) for name in flags}
    overrides = [f"{key}={given[name]}" for name in flags for key in flags[name] if given[name] is not None]
    return load_recipe(kind, options.config, [*overrides, *options.set])


def planned_processes(options: argparse.Namespace) -> int:
    """How many processes a plan is for.

    Raises:
        InputError: --processes or --tflops is not above 0.
    """
    for name in ("processes", "tflops"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name} must be above 0, but it is {value}")
    return options.processes or Ranks.from_environment().world
