"""`gakernels ask`: continue a prompt with an adapter."""

import argparse
from contextlib import nullcontext
from typing import Any

from gakernels.adapters.adapter import Adapter
from gakernels.cli.common import add_command, add_model_options, load_generator, read_text
from gakernels.errors import InputError, check_least
from gakernels.paths import user_path


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "ask",
        run,
        "Continue prompts with the adapted model; the document is not in the prompt.",
        '  gakernels ask --generator my-generator --adapter report.safetensors "Question: Who wrote it? Answer:"',
    )
    add_model_options(parser)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="text to continue")
    parser.add_argument("--adapter", type=user_path, help="adapter file that `gakernels adapt` wrote")
    parser.add_argument("--document", type=user_path, help="text file to adapt to now, instead of --adapter")
    parser.add_argument("--no-adapter", action="store_true", help="the base model alone, for comparison")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Print one continuation per line."""
    chosen = [options.adapter is not None, options.document is not None, options.no_adapter]
    if sum(chosen) != 1:
        raise InputError("give exactly one of --adapter, --document and --no-adapter")
    check_least(1, **{"--max-new-tokens": options.max_new_tokens})
    document = read_text(options.document) if options.document else None
    model = load_generator(options)
    adapter = None
    if document is not None:
        adapter = model.stream().append(document).adapter()
    elif options.adapter is not None:
        adapter = Adapter.load(options.adapter)
    with model.adapted(adapter) if adapter is not None else nullcontext():
        for text in model.generate(options.prompts, max_new_tokens=options.max_new_tokens):
            print(text)
    return 0
