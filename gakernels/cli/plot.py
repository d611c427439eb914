"""`gakernels plot`: curves of training runs."""

import argparse
from typing import Any

from gakernels.cli.common import add_command, output_file
from gakernels.paths import user_path
from gakernels.training.curves import plot_runs, read_runs


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "plot",
        run,
        "Plot the curves of training runs: losses, learning rate, gradient norm, tokens per second, and perplexities "
        "of held-out contexts. Also works during a run.",
        "  gakernels plot my-generator --output curves.png\n  gakernels plot first-try second-try --output curves.svg",
    )
    parser.add_argument("runs", type=user_path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=output_file, required=True, help="file that ends in .png, .svg or .pdf")


def run(options: argparse.Namespace) -> int:
    """Read the logs and draw."""
    runs = read_runs(options.runs)
    plot_runs(runs, options.output)
    print(f"{', '.join(run.name for run in runs)}: {options.output}")
    return 0
