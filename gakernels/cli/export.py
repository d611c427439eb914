"""`gakernels export`: an adapter in the formats of other programs."""

import argparse
from typing import Any

from gakernels.adapters.adapter import Adapter
from gakernels.cli.common import add_command, add_device_options, add_other_base_option, load_generator
from gakernels.errors import InputError
from gakernels.paths import expanded, user_path

FORMATS = ("peft", "vllm", "gguf", "merged")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "export",
        run,
        "Write an adapter for other programs: a PEFT folder (also one that follows vLLM's rules), a GGUF LoRA file "
        "for llama.cpp, or the base model with the adapter merged in.",
        "  gakernels export --adapter report.safetensors --format peft --output report-lora\n"
        "  gakernels export --adapter report.safetensors --format gguf --output report.gguf",
    )
    parser.add_argument("--adapter", type=user_path, required=True, help="adapter file that `gakernels adapt` wrote")
    parser.add_argument("--format", choices=FORMATS, default="peft", help="default: %(default)s")
    parser.add_argument("--output", type=user_path, required=True, help="folder to write (for --format gguf: file)")
    parser.add_argument("--generator", type=user_path, help="folder of the generator (for --format merged)")
    parser.add_argument(
        "--model", type=expanded, help="base model (for --format merged; default: the one that the generator names)"
    )
    add_other_base_option(parser)
    add_device_options(parser)


def run(options: argparse.Namespace) -> int:
    """Convert the adapter."""
    adapter = Adapter.load(options.adapter)
    kind = "file" if options.format == "gguf" else "folder"
    if options.output.exists() and options.output.is_dir() != (kind == "folder"):
        raise InputError(
            f"--output must be a {kind}, but {options.output} is {'not ' if kind == 'folder' else ''}a folder"
        )
    if options.format == "gguf":
        adapter.save_gguf(options.output)
    elif options.format == "merged":
        if options.generator is None:
            raise InputError("--format merged needs --generator, to load the base model")
        load_generator(options).save_merged(adapter, options.output)
    else:
        adapter.save_peft(options.output, for_vllm=options.format == "vllm")
    print(f"{options.format} {kind} written: {options.output}")
    return 0
