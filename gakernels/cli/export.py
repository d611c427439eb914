"""`gakernels export`: an adapter in the formats of other programs."""

import argparse
from pathlib import Path
from typing import Any

from gakernels.adapter import Adapter
from gakernels.cli.common import add_command, add_device_options, load_generator
from gakernels.errors import InputError
from gakernels.files import replacing


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "export",
        run,
        "Write an adapter for other programs: a PEFT folder, or the base model with the adapter merged in.",
        "  gakernels export --adapter report.safetensors --format peft --output report-lora",
    )
    parser.add_argument("--adapter", type=Path, required=True, help="adapter file that `gakernels adapt` wrote")
    parser.add_argument("--format", choices=("peft", "merged"), default="peft", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--generator", type=Path, help="folder of the generator (for --format merged)")
    parser.add_argument("--model", help="base model (for --format merged; default: the one the generator names)")
    add_device_options(parser)


def run(options: argparse.Namespace) -> int:
    """Convert the adapter."""
    adapter = Adapter.load(options.adapter)
    if options.output.is_file():
        raise InputError(f"--output must be a folder, but {options.output} is a file")
    if options.format == "peft":
        adapter.save_peft(options.output)
    else:
        if options.generator is None:
            raise InputError("--format merged needs --generator, to load the base model")
        model = load_generator(options)
        model.merge(adapter)
        with replacing(options.output) as temporary:
            model.base.save_pretrained(temporary)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(temporary)
    print(f"{options.format} folder written: {options.output}")
    return 0
