"""`gakernels pretrain`: train a generator for a base model on text."""

import argparse
import contextlib
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from gakernels.cli.common import add_command, process_device
from gakernels.cli.plan_table import print_pretraining_plan
from gakernels.cli.recipe_options import (
    add_base_options,
    add_log_options,
    add_optimisation_options,
    add_recipe_options,
    output_of,
    planned_processes,
    recipe_of,
)
from gakernels.distributed import process_group
from gakernels.model.window_losses import RECONSTRUCTIONS
from gakernels.nn.adapter_generator import NORMS
from gakernels.paths import user_path
from gakernels.training.perplexity import PerplexityReport, TaskPerplexity
from gakernels.training.plan import plan_pretraining
from gakernels.training.pretraining import make_model, pretrain
from gakernels.training.pretraining_data import cached_segments
from gakernels.training.pretraining_recipe import PretrainingRecipe

# What each option stands for in the recipe.
FLAGS = {
    "model": ("model.name",),
    "dtype": ("model.dtype",),
    "data": ("data.path",),
    "linears": ("generator.linears",),
    "layers": ("generator.layers",),
    "state_size": ("generator.state_size",),
    "rank": ("generator.rank",),
    "scale": ("generator.scale",),
    "norm": ("generator.norm",),
    "chunk_size": ("generator.chunk_size",),
    "chunks": ("windows.chunks",),
    "reconstruction": ("windows.reconstruction",),
    "batch_size": ("windows.batch_size",),
    "steps": ("trainer.steps",),
    "learning_rate": ("trainer.learning_rate",),
    "warmup_steps": ("trainer.warmup_steps",),
    "weight_decay": ("trainer.weight_decay",),
    "log_every": ("trainer.log_every",),
    "checkpoint_every": ("trainer.checkpoint_every",),
    "evaluate_every": ("trainer.evaluate_every",),
    "held_out": ("evaluation.contexts",),
    "static_lora": ("evaluation.static_lora",),
    "seed": ("seed", "generator.seed", "trainer.seed"),
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "pretrain",
        run,
        "Train a generator for a frozen base model on text: reconstruction and completion. Started again with the same "
        "options, it goes on where it stopped. On several GPUs: torchrun --nproc-per-node 8 -m gakernels pretrain ...",
        "  gakernels pretrain --model my-model --data texts/ --output my-generator --steps 2000\n"
        "  gakernels pretrain --config my-recipe.yaml --set trainer.learning_rate=1e-4 --output my-generator\n"
        "  gakernels pretrain --config mistral-7b-pretraining --dry-run --processes 8",
    )
    parser.add_argument("--model", help="base model, a folder or hub name")
    parser.add_argument(
        "--data", help="folder of .txt, .jsonl and .parquet files (also .gz, .xz, .bz2, .zst), or hub:NAME"
    )
    parser.add_argument("--output", type=user_path, help="folder for generator, log, checkpoints and report")
    add_recipe_options(parser)
    generator = parser.add_argument_group("generator")
    generator.add_argument("--linears", help="linear layers to adapt, with commas (default: o_proj)")
    generator.add_argument("--layers", help="decoder layers to adapt, with commas (default: all)")
    generator.add_argument("--state-size", type=int, help="d_r (default: 1024)")
    generator.add_argument("--rank", type=int, help="r (default: 128)")
    generator.add_argument("--scale", type=float, help="factor of the adapter (default: 64 / d_r)")
    generator.add_argument("--norm", choices=NORMS, help="default: polar")
    windows = parser.add_argument_group("windows")
    windows.add_argument("--chunk-size", type=int, help="tokens in a window (default: 1024)")
    windows.add_argument("--chunks", type=int, help="context windows in a segment (default: 8)")
    windows.add_argument("--reconstruction", choices=RECONSTRUCTIONS, help="default: random_slice")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--steps", type=int, help="optimizer steps")
    optimisation.add_argument("--batch-size", type=int, help="segments in a step (default: 8)")
    add_optimisation_options(optimisation)
    report = parser.add_argument_group("log and report")
    report.add_argument("--held-out", type=int, help="contexts kept for the report (default: 32)")
    report.add_argument("--static-lora", action="store_true", default=None, help="also train a static LoRA, as long")
    add_log_options(report)
    add_base_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the plan, or train and print the report."""
    recipe = recipe_of(PretrainingRecipe, options, FLAGS)
    if options.dry_run:
        plan = plan_pretraining(recipe, planned_processes(options), torch.device(options.device).type)
        print_pretraining_plan(plan, options.tflops, _segments(recipe))
        return 0
    folder = output_of(options)
    device = process_device(options.device)
    with process_group(device) as ranks:
        report = pretrain(make_model(recipe, device), recipe, folder, ranks=ranks)
        if ranks.rank == 0:
            _print(report)
            print(f"generator, log and report: {folder}")
    return 0


def _segments(recipe: PretrainingRecipe) -> int | None:
    """Segments of the data, where its tokens are cached already."""
    with contextlib.suppress(OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(recipe.model.name, local_files_only=True)
        return cached_segments(recipe.data, tokenizer, recipe.segment_tokens)
    return None


def _print(report: PerplexityReport) -> None:
    console = Console()
    size = f"{report.contexts} held-out contexts of {report.context_tokens:,} tokens"
    console.print(_table(f"Reconstruction: {size}", report.reconstruction, report.other_documents))
    if report.completion is not None:
        console.print(_table("Completion: what follows them", report.completion, report.other_documents))
    console.print("own / this: 95% interval by paired bootstrap over contexts")


def _table(title: str, task: TaskPerplexity, other_documents: bool) -> Table:
    labels = {
        "none": "base model, no adapter",
        "empty": "adapter of an empty context",
        "static_lora": "static LoRA, trained as long",
        "other": f"adapter of another {'document' if other_documents else 'context'}",
        "own": "adapter of its own context",
    }
    table = Table(title=title, title_justify="left")
    table.add_column("adapter", no_wrap=True)
    for heading in ("perplexity", "own / this"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, label in labels.items():
        if name in task.perplexity:
            ratio = task.own_over.get(name)
            interval = "" if ratio is None else f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
            table.add_row(label, f"{task.perplexity[name]:.3f}", interval)
    return table
