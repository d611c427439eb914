"""`gakernels finetune`: instruction tuning of a generator on conversations about contexts."""

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from gakernels.cli.common import add_command, process_device
from gakernels.cli.plan_table import USUAL_TFLOPS, duration, operations
from gakernels.cli.recipe_options import (
    add_base_options,
    add_log_options,
    add_optimisation_options,
    add_recipe_options,
    output_of,
    planned_processes,
    recipe_of,
)
from gakernels.data.bad_records import BadRecords
from gakernels.distributed import process_group
from gakernels.paths import user_path
from gakernels.training.instruction.finetuning import finetune, make_tuned_model
from gakernels.training.instruction.plan import TuningPlan, plan_finetuning
from gakernels.training.instruction.recipe import FinetuningRecipe
from gakernels.training.instruction.report import AnswerReport

# What each option stands for in the recipe.
FLAGS = {
    "generator": ("start",),
    "model": ("model.name",),
    "dtype": ("model.dtype",),
    "data": ("data.path",),
    "held_out_data": ("data.held_out_path",),
    "context_tokens": ("data.context_tokens",),
    "strict": ("data.strict",),
    "allow_skipped": ("data.allow_skipped",),
    "batch_size": ("batches.batch_size",),
    "conversations": ("batches.conversations",),
    "losses": ("batches.losses",),
    "epochs": ("epochs",),
    "steps": ("trainer.steps",),
    "learning_rate": ("trainer.learning_rate",),
    "warmup_steps": ("trainer.warmup_steps",),
    "weight_decay": ("trainer.weight_decay",),
    "log_every": ("trainer.log_every",),
    "checkpoint_every": ("trainer.checkpoint_every",),
    "evaluate_every": ("trainer.evaluate_every",),
    "held_out": ("evaluation.contexts",),
    "seed": ("seed", "trainer.seed"),
}
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
        "Started again with the same options, it goes on where it stopped. On several GPUs: "
        "torchrun --nproc-per-node 8 -m gakernels finetune ...",
        "  gakernels finetune --generator my-generator --data questions.jsonl --output my-tuned-generator\n"
        "  gakernels finetune --config mistral-7b-finetuning --set data.path=mix/ --dry-run",
    )
    parser.add_argument("--generator", help="generator to go on from, a folder or hub name")
    parser.add_argument("--model", help="base model, a folder or hub name (default: the one that --generator names)")
    parser.add_argument(
        "--data", help="file or folder of .jsonl, .json and .parquet (also .gz, .xz, .bz2, .zst), or hub:NAME"
    )
    parser.add_argument("--output", type=user_path, help="folder for generator, log, checkpoints and report")
    add_recipe_options(parser)
    data = parser.add_argument_group("data and batches")
    data.add_argument("--held-out-data", help="file or folder to score (default: the end of --data)")
    data.add_argument("--context-tokens", type=int, help="longer contexts are left out (default: 8192)")
    data.add_argument("--strict", action="store_true", default=None, help="a record that can't be used is an error")
    data.add_argument(
        "--allow-skipped",
        action="store_true",
        default=None,
        help="go on where more than 5%% of a source's rows can't be used",
    )
    data.add_argument("--batch-size", type=int, help="contexts in a step (default: 32)")
    data.add_argument("--conversations", type=int, help="about each context in a step, at most (default: 16)")
    data.add_argument("--losses", help="answers, and reconstruction, completion beside it, with commas")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", type=float, help="how often the contexts are gone through (default: 2)")
    optimisation.add_argument("--steps", type=int, help="optimizer steps, if they are to be fewer")
    add_optimisation_options(optimisation)
    report = parser.add_argument_group("log and report")
    report.add_argument("--held-out", type=int, help="contexts kept for the report (default: 32)")
    add_log_options(report)
    add_base_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the plan, or tune and print the report."""
    recipe = recipe_of(FinetuningRecipe, options, FLAGS)
    if options.dry_run:
        _print_plan(plan_finetuning(recipe, planned_processes(options)), options.tflops)
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


def _print_plan(plan: TuningPlan, tflops: float | None) -> None:
    data, load = plan.data, plan.load
    rows = [
        ("parameters of the base, frozen", f"{plan.base_parameters:,}"),
        ("parameters of the generators, trained", f"{plan.generator_parameters:,}"),
        ("contexts to train on", f"{data.contexts:,}, with {data.conversations:,} conversations"),
        ("contexts held out", f"{len(data.held_out):,}"),
        ("records left out", _counts(data.skipped)),
        ("conversations cut to their last exchanges", _counts(data.shortened)),
        ("steps", f"{plan.steps:,} of {plan.contexts} contexts: {plan.rounds:,.2f} rounds"),
        ("tokens in a step", f"{load.tokens:,.0f} on average, {load.padding:.1%} of the positions are padding"),
        ("passes in a step", f"{load.batches:,.1f} on each of {plan.processes} process(es)"),
        ("operations of a step, at most about", operations(plan.flops)),
        *[
            (f"time at {rate:,g} TFLOP/s a process, at most about", duration(plan.seconds(rate)))
            for rate in ([tflops] if tflops else USUAL_TFLOPS)
        ],
    ]
    table = Table(title=f"Plan for {plan.name}", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    if data.refusal is not None:
        console.print(f"A run stops: {data.refusal}", markup=False)


def _counts(records: BadRecords) -> str:
    return "\n".join(f"{count:,} x {kind}" for kind, count in records.counts.items()) or "none"
