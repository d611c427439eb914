"""The command line: one command a module, see `gakernels --help`."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from gakernels.version import __version__

USER_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 for success, 2 for a user's mistake, 130 when interrupted.

    Mistakes are told in one line; anything else is a defect and shows its traceback.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from gakernels.errors import BackendError, InputError

    try:
        _quiet_libraries()
        code: int = options.run(options)
        return code
    except (InputError, BackendError, OSError, FloatingPointError) as error:
        print(f"gakernels {options.command}:", *str(error).split("\n"), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"gakernels {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """Tells a wrong option in one line, as all other mistakes are told."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    from gakernels.cli import (
        adapt,
        ask,
        calibrate,
        convert_checkpoint,
        demo,
        eval,
        export,
        finetune,
        info,
        plot,
        pretrain,
        serve,
    )

    parser = _Parser(prog="gakernels", description="Turn contexts into adapters of a language model.")
    parser.add_argument("--version", action="version", version=f"gakernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        demo,
        adapt,
        ask,
        pretrain,
        finetune,
        convert_checkpoint,
        plot,
        export,
        serve,
        eval,
        calibrate,
        info,
    ):
        module.add_parser(commands)
    return parser


def _quiet_libraries() -> None:
    """Leave the terminal to this program's own progress and results."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
