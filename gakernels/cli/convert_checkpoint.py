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
        "Rewrite training checkpoints of earlier versions, whose .metadata is a pickle. Reading a pickle runs whatever "
        "code is in it: convert only checkpoints that you made or whose maker you trust.",
        "  gakernels convert-checkpoint runs/my-generator --trust",
    )
    parser.add_argument("folder", type=user_path, help="a checkpoint, or the folder of a run")
    parser.add_argument("--trust", action="store_true", help="you trust whoever made it: its pickle is read")


def run(options: argparse.Namespace) -> int:
    """Convert the checkpoints."""
    if not options.trust:
        raise InputError(
            f"--trust is needed to read {options.folder}: its pickle can run any code with your rights, and nothing "
            "here can check it"
        )
    converted = convert(options.folder)
    for path in converted:
        print(f"converted {path}")
    if not converted:
        print(f"{options.folder} holds no checkpoint of an earlier version")
    return 0
