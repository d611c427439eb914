"""`gakernels finetune`: instruction tuning of a generator on conversations about contexts."""

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gakernels.cli.common import add_command, process_device
from gakernels.cli.plan_table import print_finetuning_plan
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
from gakernels.paths import user_path
from gakernels.training.instruction.answers import AnswerReport
from gakernels.training.instruction.finetuning import finetune, make_tuned_model
from gakernels.training.instruction.recipe import FinetuningRecipe
from gakernels.training.plan import plan_finetuning

ADAPTERS = {
    "none": "base model, no adapter",
    "empty": "adapter of an empty context",
    "other": "adapter of another context",
    "own": "adapter of its own context",
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "finetune",
        run,
        "Tune a generator on conversations about contexts, with a loss on the answers (docs/training.md). "
        "Started again with the same options, it resumes where it stopped. On several GPUs: "
        "torchrun --nproc-per-node 8 -m gakernels finetune ...",
        "  gakernels finetune --generator my-generator --data questions.jsonl --output my-tuned-generator\n"
        "  gakernels finetune --config mistral-7b-finetuning --set data.path=mix/ --dry-run",
    )
    add_setting(parser, "--generator", "start", "generator to start from: a folder or hub name")
    add_setting(
        parser, "--model", "model.name", "base model: a folder or hub name (default: the one that --generator names)"
    )
    add_setting(
        parser,
        "--data",
        "data.path",
        "file or folder of .jsonl, .json and .parquet (also .gz, .xz, .bz2, .zst), or hub:NAME",
    )
    parser.add_argument("--output", type=user_path, help="folder for generator, log, checkpoints and report")
    add_recipe_options(parser)
    data = parser.add_argument_group("data and batches")
    add_setting(data, "--held-out-data", "data.held_out_path", "file or folder to score (default: the end of --data)")
    add_setting(
        data, "--context-tokens", "data.context_tokens", "longer contexts are left out (default: 8192)", type=int
    )
    add_setting(data, "--strict", "data.strict", "treat a record that can't be used as an error", action="store_true")
    add_setting(
        data,
        "--allow-skipped",
        "data.allow_skipped",
        "continue even if more than 5%% of a source's rows can't be used",
        action="store_true",
    )
    add_setting(data, "--batch-size", "batches.batch_size", "contexts per step (default: 32)", type=int)
    add_setting(
        data,
        "--conversations",
        "batches.conversations",
        "most conversations about a context per step (default: 16)",
        type=int,
    )
    add_setting(
        data, "--losses", "batches.losses", "answers, and optionally reconstruction and completion, separated by commas"
    )
    optimisation = parser.add_argument_group("optimisation")
    add_setting(optimisation, "--epochs", "epochs", "passes over the contexts (default: 2)", type=float)
    add_setting(optimisation, "--steps", "trainer.steps", "optimizer steps, if fewer than --epochs gives", type=int)
    add_optimisation_options(optimisation, "seed trainer.seed")
    report = parser.add_argument_group("log and report")
    add_setting(report, "--held-out", "evaluation.contexts", "contexts kept for the report (default: 32)", type=int)
    add_log_options(report)
    add_base_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the plan, or tune and print the report."""
    recipe = recipe_of(FinetuningRecipe, options)
    if options.dry_run:
        plan = plan_finetuning(recipe, planned_processes(options), torch.device(options.device).type)
        print_finetuning_plan(plan, options.tflops)
        return 0
    folder = output_of(options)
    device = process_device(options.device)
    with process_group(device) as ranks:
        report = finetune(make_tuned_model(recipe, device), recipe, folder, ranks=ranks)
        if ranks.rank == 0:
            _print(report)
            print(f"generator, log and report: {folder}")
    return 0


def _print(report: AnswerReport) -> None:
    table = Table(
        title=f"Held-out answers: {report.answers:,} about {report.contexts} contexts, {report.tokens:,} tokens",
        title_justify="left",
    )
    table.add_column("adapter", no_wrap=True)
    for heading in ("perplexity", "exact", "own / this"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, label in ADAPTERS.items():
        if name in report.perplexity:
            interval = "{:.3f} to {:.3f}".format(*report.own_over[name]) if name in report.own_over else ""
            table.add_row(label, f"{report.perplexity[name]:.3f}", f"{report.exact[name]:.1%}", interval)
    console = Console()
    console.print(table)
    console.print("exact: greedy decoding gives the whole answer; own / this: 95% interval over contexts")
