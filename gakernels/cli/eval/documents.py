"""`gakernels eval documents`: what documents cost, and whether the adapters of several add up."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from gakernels.cli.common import add_command, add_model_options, load_generator, output_file
from gakernels.cli.eval.running import numbers, rich_table
from gakernels.data.sources import HUB
from gakernels.demo import ASSETS, smollm2
from gakernels.errors import InputError, check_least
from gakernels.evaluation import report as reports
from gakernels.evaluation.datasets import read_documents
from gakernels.evaluation.document_reading import measure_reading
from gakernels.evaluation.document_report import build, markdown, tables
from gakernels.evaluation.document_sets import check_counts, measure_sets
from gakernels.evaluation.prompts import QA_NEW_TOKENS
from gakernels.files import write_text
from gakernels.paths import expanded

QUESTIONS = ASSETS / "questions" / "squad.jsonl"


def add_documents(tasks: Any) -> None:
    """Add the task."""
    parser = add_command(
        tasks,
        "documents",
        run_documents,
        "Measure what users ask about documents (docs/documents.md): how long one takes and how much memory, what "
        "appending a page costs, and whether the adapters of several add up. Without --generator: SmolLM2 and the "
        "generator of the package.",
        "  gakernels eval documents --json documents.json\n"
        "  gakernels eval documents --generator my-generator --device cuda --sizes 1000000,10000000",
    )
    add_model_options(parser, generator_required=False)
    parser.add_argument(
        "--data",
        type=expanded,
        default=str(QUESTIONS),
        help="documents with questions, as for docqa (default: 100 questions about 80 paragraphs of SQuAD)",
    )
    parser.add_argument(
        "--sizes",
        default="10000,100000,1000000",
        help="bytes of the document that is read, separated by commas; it consists of the texts of --data, again and "
        "again (default: %(default)s)",
    )
    parser.add_argument(
        "--counts", default="2,4,8,16", help="documents in a set, separated by commas (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=QA_NEW_TOKENS, help="most tokens of an answer (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sets (default: %(default)s)")
    parser.add_argument("--json", type=output_file, help="write the results here, and as Markdown next to it")


def run_documents(options: argparse.Namespace) -> int:
    """Measure, show the tables and write the results."""
    if options.json is not None and options.json.suffix != ".json":
        raise InputError(f"--json must be a file whose name ends in .json, but it is {options.json}")
    check_least(1, **{"--new-tokens": options.new_tokens})
    sizes, counts = numbers(options.sizes, "--sizes"), numbers(options.counts, "--counts")
    contexts = read_documents(options.data).contexts
    check_counts(counts, len(contexts))
    _find_models(options)
    model = load_generator(options).eval()
    costs, kept = measure_reading(model, [context.text for context in contexts], sizes)
    sets = measure_sets(model, contexts, counts, options.seed, options.new_tokens)
    settings = {
        "data": options.data if options.data.startswith(HUB) else Path(options.data).name,
        **{name: getattr(options, name) for name in ("sizes", "counts", "new_tokens", "seed")},
        **reports.describe_model(model),
    }
    report, shown = build(model, costs, kept, sets, settings), tables(costs, kept, sets)
    console = Console()
    for table in shown:
        console.print(rich_table(table))
    if options.json is not None:
        write_text(options.json, json.dumps(report, indent=2) + "\n")
        write_text(options.json.with_suffix(".md"), markdown(report, shown))
    return 0


def _find_models(options: argparse.Namespace) -> None:
    """Fill in the generator and base model if the user names none.

    Raises:
        InputError: SmolLM2 can't be fetched.
    """
    if options.generator is not None:
        return
    options.generator = smollm2.GENERATOR
    if options.model is None:
        try:
            options.model = str(smollm2.fetch())
        except OSError as error:
            needed = "--model must name a copy of SmolLM2-135M-Instruct, since it can't be fetched"
            raise InputError(f"{needed}: {error}") from error
