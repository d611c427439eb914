"""Options and steps that several commands share."""

import argparse
from pathlib import Path
from typing import Any

import torch

from gakernels.distributed import Ranks
from gakernels.errors import InputError, first_line
from gakernels.model import GENERATOR_FILE, GenerativeAdapter
from gakernels.model.hub import is_repository_name
from gakernels.model.released import is_released
from gakernels.paths import expanded, user_path
from gakernels.training.base_model import DTYPES
from gakernels.user_text import read_user_text


def add_command(commands: Any, name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
    """Add a subcommand whose help ends with an example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def output_file(name: str) -> Path:
    """An argument that names a file to write."""
    path = user_path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"it must be a file, but {path} is a folder")
    return path


def add_model_options(parser: argparse.ArgumentParser, generator_required: bool = True) -> None:
    """Add --generator, --model, --allow-other-base, --device and --dtype."""
    parser.add_argument(
        "--generator", type=user_path, required=generator_required, help="folder or hub name of a generator"
    )
    parser.add_argument(
        "--model",
        type=expanded,
        help="base model: a folder, GGUF file or hub name (default: the one that the generator names)",
    )
    add_other_base_option(parser)
    add_device_options(parser)


def add_other_base_option(parser: argparse.ArgumentParser) -> None:
    """Add --allow-other-base."""
    parser.add_argument(
        "--allow-other-base",
        action="store_true",
        help="accept a base model that the generator was not trained for, with a warning",
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add --device and --dtype."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the base model (default: its own)")


def check_device(device: str) -> None:
    """Raises: InputError: the device of --device does not exist."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise InputError(f"--device must be a device of this machine, but {device!r} is not: {reason}") from error


def process_device(device: str) -> str:
    """The device of this process: with `cuda`, the GPU with its local rank, so that it uses no other.

    Raises:
        InputError: it does not exist, or torchrun's environment is incomplete.
    """
    own = f"cuda:{Ranks.from_environment().local_rank}" if device == "cuda" else device
    check_device(own)
    return own


def load_generator(options: argparse.Namespace) -> GenerativeAdapter:
    """The generator and base model that the options name.

    Raises:
        InputError: one does not exist, or they don't belong together.
    """
    folder = options.generator
    if not ((folder / GENERATOR_FILE).is_file() or is_released(folder) or is_repository_name(folder)):
        raise InputError(f"--generator must be a folder with a {GENERATOR_FILE}, but {options.generator} has none")
    check_device(options.device)
    model = GenerativeAdapter.from_pretrained(
        options.generator, options.model, dtype=torch.float32, allow_other_base=options.allow_other_base
    )
    model.base.to(options.device, DTYPES.get(options.dtype, model.base.dtype))
    model.generators.to(options.device)
    return model


def read_text(path: Path, option: str = "--document") -> str:
    """The text of a file.

    Raises:
        InputError: it is missing, empty or not text.
    """
    try:
        text = read_user_text(path)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    if not text.strip():
        raise InputError(f"{option}: {path} is empty")
    return text
