"""`gakernels convert-checkpoint`: convert checkpoints of earlier versions, which contain a pickle."""

import argparse
from typing import Any

from gakernels.cli.common import add_command
from gakernels.errors import InputError
from gakernels.paths import user_path
from gakernels.training.old_checkpoint import convert


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "convert-checkpoint",
        run,
        "Rewrite training checkpoints of earlier versions, whose .metadata is a pickle. Reading a pickle can run any "
        "code: convert only checkpoints that you made yourself or whose author you trust.",
        "  gakernels convert-checkpoint runs/my-generator --trust",
    )
    parser.add_argument("folder", type=user_path, help="a checkpoint, or the folder of a run")
    parser.add_argument("--trust", action="store_true", help="read the pickle, because you trust whoever made it")


def run(options: argparse.Namespace) -> int:
    """Convert the checkpoints."""
    if not options.trust:
        raise InputError(
            f"--trust is needed to read {options.folder}: its pickle can run any code with your permissions, and "
            "this can't be checked"
        )
    converted = convert(options.folder)
    for path in converted:
        print(f"converted {path}")
    if not converted:
        print(f"{options.folder} holds no checkpoint of an earlier version")
    return 0
