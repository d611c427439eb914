"""`gakernels pretrain`: train a generator for a base model on text files."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gakernels.cli.common import DTYPES, add_command, add_device_options, check_device
from gakernels.configuration import GeneratorConfig
from gakernels.errors import InputError
from gakernels.evaluation.perplexity import PerplexityReport
from gakernels.model import GenerativeAdapter, load_base
from gakernels.nn.adapter_generator import NORMS
from gakernels.training.objectives import RECONSTRUCTIONS
from gakernels.training.pretraining import PretrainingConfig, pretrain
from gakernels.training.trainer import TrainerConfig


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "pretrain",
        run,
        "Train a generator for a frozen base model on text: reconstruction and completion. Started again with the same "
        "options, it goes on where it stopped.",
        "  gakernels pretrain --model my-model --data texts/ --output my-generator --steps 2000",
    )
    parser.add_argument("--model", required=True, help="base model, a folder or hub name")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of .txt and .jsonl files (also .gz, .xz, .bz2)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for generator, log, checkpoints and report")
    generator = parser.add_argument_group("generator")
    generator.add_argument(
        "--linears", default="o_proj", help="linear layers to adapt, with commas (default: %(default)s)"
    )
    generator.add_argument("--layers", help="decoder layers to adapt, with commas (default: all)")
    generator.add_argument("--state-size", type=int, default=1024, help="d_r (default: %(default)s)")
    generator.add_argument("--rank", type=int, default=128, help="r (default: %(default)s)")
    generator.add_argument("--scale", type=float, help="factor of the adapter (default: 64 / d_r)")
    generator.add_argument("--norm", choices=NORMS, default="polar", help="default: %(default)s")
    windows = parser.add_argument_group("windows")
    windows.add_argument("--chunk-size", type=int, default=1024, help="tokens in a window (default: %(default)s)")
    windows.add_argument("--chunks", type=int, default=8, help="context windows in a segment (default: %(default)s)")
    windows.add_argument(
        "--reconstruction", choices=RECONSTRUCTIONS, default="random_slice", help="default: %(default)s"
    )
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--steps", type=int, required=True, help="optimizer steps")
    optimisation.add_argument("--batch-size", type=int, default=8, help="segments in a step (default: %(default)s)")
    optimisation.add_argument("--learning-rate", type=float, default=5e-5, help="default: %(default)s")
    optimisation.add_argument("--warmup-steps", type=int, default=100, help="default: %(default)s")
    optimisation.add_argument("--weight-decay", type=float, default=0.01, help="default: %(default)s")
    optimisation.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    report = parser.add_argument_group("log and report")
    report.add_argument("--held-out", type=int, default=32, help="segments kept for the report (default: %(default)s)")
    report.add_argument("--static-lora", action="store_true", help="also train a static LoRA with the same budget")
    report.add_argument("--log-every", type=int, default=10, help="steps (default: %(default)s)")
    report.add_argument("--checkpoint-every", type=int, default=500, help="steps (default: %(default)s)")
    add_device_options(parser)


def run(options: argparse.Namespace) -> int:
    """Train and print the report."""
    generator_config = GeneratorConfig(
        linears=tuple(name.strip() for name in options.linears.split(",")),
        layers=None if options.layers is None else _numbers(options.layers),
        state_size=options.state_size,
        rank=options.rank,
        scale=options.scale,
        chunk_size=options.chunk_size,
        norm=options.norm,
        seed=options.seed,
    )
    config = PretrainingConfig(
        data=options.data,
        chunks=options.chunks,
        batch_size=options.batch_size,
        reconstruction=options.reconstruction,
        held_out=options.held_out,
        static_lora=options.static_lora,
        seed=options.seed,
    )
    trainer = TrainerConfig(
        steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        log_every=options.log_every,
        checkpoint_every=options.checkpoint_every,
        label="generator",
    )
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"--output must be a folder, but {options.output} is a file")
    check_device(options.device)
    base, tokenizer = load_base(options.model, dtype=DTYPES[options.dtype])
    model = GenerativeAdapter(base.to(options.device), generator_config, tokenizer)
    report = pretrain(model, config, trainer, options.output)
    _print(report)
    print(f"generator, log and report: {options.output}")
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise InputError(f"--layers must be numbers with commas between them, but it is {text!r}") from error


def _print(report: PerplexityReport) -> None:
    names = {
        "none": "base model, no adapter",
        "static_lora": "static LoRA, same layers, rank, windows and steps",
        "other": "generated adapter of another context",
        "own": "generated adapter of its own context",
    }
    table = Table(title=f"Held-out windows: {report.contexts} contexts, {report.tokens:,} tokens")
    table.add_column("adapter")
    table.add_column("perplexity", justify="right")
    for name, label in names.items():
        if name in report.perplexity:
            table.add_row(label, f"{report.perplexity[name]:.3f}")
    console = Console()
    console.print(table)
    low, high = report.own_over_other
    console.print(f"own / other: {low:.3f} to {high:.3f} (95% paired bootstrap over contexts)")
