"""`gakernels adapt`: from documents to an adapter."""

import argparse
import time
from typing import Any

from gakernels.cli.common import add_command, add_model_options, load_generator, output_file, read_text
from gakernels.errors import InputError
from gakernels.model.stream import ContextStream
from gakernels.paths import user_path


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "adapt",
        run,
        "Read documents and write their adapter.",
        "  gakernels adapt --generator my-generator --document report.txt --output report.safetensors",
    )
    add_model_options(parser)
    parser.add_argument(
        "--document",
        type=user_path,
        action="append",
        required=True,
        help="text file; repeat for several, which are read in order",
    )
    parser.add_argument("--output", type=output_file, required=True, help="adapter file to write")
    parser.add_argument("--state", type=output_file, help="state file: read first if it exists, and written at the end")
    parser.add_argument(
        "--chunks-per-pass",
        type=int,
        default=8,
        help="chunks per forward pass, to bound the memory (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Read the documents into a stream and save its adapter."""
    if options.state is not None and options.state.resolve() == options.output.resolve():
        raise InputError(f"--output and --state must be different files, but both are {options.output}")
    texts = [read_text(path) for path in options.document]
    model = load_generator(options)
    continued = options.state is not None and options.state.is_file()
    stream = ContextStream.load(model, options.state) if continued else model.stream()
    before, start = stream.tokens_seen, time.perf_counter()
    for text in texts:
        stream.append(text, options.chunks_per_pass)
    adapter = stream.adapter()
    seconds = time.perf_counter() - start
    adapter.save(options.output)
    if options.state is not None:
        stream.save(options.state)
    earlier = f" after {before} of the saved state" if continued else ""
    print(f"{stream.tokens_seen - before} tokens read in {seconds:.2f} s{earlier}")
    print(f"adapter of rank {adapter.rank} for {len(adapter.lora_a)} layers ({adapter.numbers():,} numbers) written:")
    print(options.output)
    return 0
