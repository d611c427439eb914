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
    add_setting,
    output_of,
    planned_processes,
    recipe_of,
)
from gakernels.distributed import process_group
from gakernels.model.base_model import model_source
from gakernels.model.window_losses import RECONSTRUCTIONS
from gakernels.nn.adapter_generator import NORMS
from gakernels.paths import user_path
from gakernels.training.perplexity import PerplexityReport, TaskPerplexity
from gakernels.training.plan import plan_pretraining
from gakernels.training.pretraining import make_model, pretrain
from gakernels.training.pretraining_data import cached_segments
from gakernels.training.pretraining_recipe import PretrainingRecipe


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "pretrain",
        run,
        "Train a generator for a frozen base model on text: reconstruction and completion. Started again with the same "
        "options, it resumes where it stopped. On several GPUs: torchrun --nproc-per-node 8 -m gakernels pretrain ...",
        "  gakernels pretrain --model my-model --data texts/ --output my-generator --steps 2000\n"
        "  gakernels pretrain --config my-recipe.yaml --set trainer.learning_rate=1e-4 --output my-generator\n"
        "  gakernels pretrain --config mistral-7b-pretraining --dry-run --processes 8",
    )
    add_setting(parser, "--model", "model.name", "base model: a folder, GGUF file or hub name")
    add_setting(
        parser,
        "--data",
        "data.path",
        "folder of .txt, .jsonl and .parquet files (also .gz, .xz, .bz2, .zst), or hub:NAME",
    )
    parser.add_argument("--output", type=user_path, help="folder for generator, log, checkpoints and report")
    add_recipe_options(parser)
    generator = parser.add_argument_group("generator")
    add_setting(
        generator, "--linears", "generator.linears", "linear layers to adapt, comma-separated (default: o_proj)"
    )
    add_setting(generator, "--layers", "generator.layers", "decoder layers to adapt, comma-separated (default: all)")
    add_setting(generator, "--state-size", "generator.state_size", "d_r (default: 1024)", type=int)
    add_setting(generator, "--rank", "generator.rank", "r (default: 128)", type=int)
    add_setting(generator, "--scale", "generator.scale", "factor of the adapter (default: 64 / d_r)", type=float)
    add_setting(generator, "--norm", "generator.norm", "default: polar", choices=NORMS)
    windows = parser.add_argument_group("windows")
    add_setting(windows, "--chunk-size", "generator.chunk_size", "tokens per window (default: 1024)", type=int)
    add_setting(windows, "--chunks", "windows.chunks", "context windows per segment (default: 8)", type=int)
    add_setting(windows, "--reconstruction", "windows.reconstruction", "default: random_slice", choices=RECONSTRUCTIONS)
    optimisation = parser.add_argument_group("optimisation")
    add_setting(optimisation, "--steps", "trainer.steps", "optimizer steps", type=int)
    add_setting(optimisation, "--batch-size", "windows.batch_size", "segments per step (default: 8)", type=int)
    add_optimisation_options(optimisation, "seed generator.seed trainer.seed")
    report = parser.add_argument_group("log and report")
    add_setting(report, "--held-out", "evaluation.contexts", "contexts kept for the report (default: 32)", type=int)
    add_setting(
        report,
        "--static-lora",
        "evaluation.static_lora",
        "also train a static LoRA for as many steps",
        action="store_true",
    )
    add_log_options(report)
    add_base_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the plan, or train and print the report."""
    recipe = recipe_of(PretrainingRecipe, options)
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
    """The number of segments of the data, if its tokens are already cached."""
    with contextlib.suppress(OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(**model_source(recipe.model.name), local_files_only=True)
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
