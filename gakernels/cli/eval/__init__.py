"""`gakernels eval`: the quality of a generator, and its cost."""

import argparse
from typing import Any

from gakernels.cli.common import add_command
from gakernels.cli.eval.cost import add_cost
from gakernels.cli.eval.documents import add_documents
from gakernels.cli.eval.tasks import add_dialog, add_docqa, add_haystack, add_icl, add_perplexity, add_recall


def add_parser(commands: Any) -> None:
    """Add the command and its subcommands."""
    parser = add_command(
        commands,
        "eval",
        None,  # each task has its own
        "Evaluate a generator against prompting, retrieval, fine-tuning and controls (docs/evaluation.md).",
        "  gakernels eval docqa --generator my-generator --data dev.json --limit 500 --json results.json\n"
        "  gakernels eval cost --shape mistral-7b --context 1024,8192",
    )
    add_tasks(parser)


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for add_task in (
        add_docqa,
        add_icl,
        add_dialog,
        add_perplexity,
        add_recall,
        add_haystack,
        add_documents,
        add_cost,
    ):
        add_task(tasks)
