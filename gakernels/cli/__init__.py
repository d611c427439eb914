"""The command line: one command per module, see `gakernels --help`."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from gakernels.version import __version__

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
COMMANDS = (  # each in its module, in the order of the help
    *("demo", "adapt", "ask", "pretrain", "finetune", "convert_checkpoint", "plot", "export", "push", "pull"),
    *("serve", "serve_export", "data", "eval", "reproduce", "calibrate", "info"),
)
STANDARD_OUTPUT = {Path(name) for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 for success, 2 for a user's mistake, 130 when interrupted, and 141 if
    the reader of the output has gone (`gakernels ... | head`).

    Mistakes are reported in one line; anything else is a defect and shows its traceback. If the output file is the
    standard output, a command's other messages go to standard error.
    """
    parser = _parser()
    try:
        try:
            options = parser.parse_args(arguments)
        except SystemExit:
            _flush()
            raise
        return _run(options)
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:  # help needs an output too
        return _mistake(parser.prog, error)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # as rich reports it
            return BROKEN_PIPE
        raise
    finally:
        with suppress(OSError):
            _flush()


def _run(options: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from gakernels.errors import BackendError, InputError

    command = f"gakernels {options.command}"
    is_output = any(value in STANDARD_OUTPUT for value in vars(options).values() if isinstance(value, Path))
    try:
        _quiet_libraries()
        with redirect_stdout(sys.stderr) if is_output else nullcontext():
            code: int = options.run(options)
        _flush()
        return code
    except BrokenPipeError:
        raise
    except (InputError, BackendError, OSError, FloatingPointError) as error:
        return _mistake(command, error)
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _mistake(command: str, error: Exception) -> int:
    print(f"{command}:", *str(error).split("\n"), file=sys.stderr)
    return USER_ERROR


def _flush() -> None:
    """Flush the output: Python does it only at exit, when it has no good way to report an error."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python would try again
            raise


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, like all other mistakes."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gakernels", description="Turn contexts into adapters of a language model.")
    parser.add_argument("--version", action="version", version=f"gakernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"gakernels.cli.{name}").add_parser(commands)
    return parser


def _quiet_libraries() -> None:
    """Keep libraries from writing to the terminal next to this program's progress and results."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
