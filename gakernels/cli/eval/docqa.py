"""`gakernels eval docqa`: questions about documents."""

import argparse
from pathlib import Path
from typing import Any

from gakernels.cli.common import add_command
from gakernels.cli.eval.running import add_question_options, add_run_options, ask_settings, evaluate, numbers
from gakernels.data.sources import HUB
from gakernels.evaluation.cases import Scenario
from gakernels.evaluation.flat_qa import is_squad, is_streaming_qa, read_flat_qa
from gakernels.evaluation.records import Dataset, Question
from gakernels.evaluation.scenarios.docqa import docqa
from gakernels.evaluation.squad import PARTS, read_squad
from gakernels.evaluation.streaming_qa import read_streaming_qa
from gakernels.generation.decoder import Decoder
from gakernels.model import GenerativeAdapter
from gakernels.paths import expanded


def add_task(tasks: Any) -> None:
    """Add the task."""
    parser = add_command(
        tasks,
        "docqa",
        run,
        "Questions about documents, which are grouped to contexts of given lengths: F1 and exact match.",
        "  gakernels eval docqa --generator my-generator --data dev-v1.1.json --lengths 512,2048 \\\n"
        "      --methods closed_book,prompt,adapter --limit 500 --json results.json",
    )
    parser.add_argument(
        "--data",
        type=expanded,
        required=True,
        help="SQuAD or StreamingQA file, or rows {context, question, answer}: .json, .jsonl, .parquet, .csv, hub:NAME",
    )
    parser.add_argument(
        "--lengths",
        default="512,1024,2048,4096",
        help="tokens of a context, with commas, or `own`: each document by itself (default: %(default)s)",
    )
    parser.add_argument("--part", choices=PARTS, help="of the groups of documents (default: the protocol's)")
    add_run_options(parser)
    add_question_options(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate."""
    lengths = None if options.lengths == "own" else numbers(options.lengths, "--lengths")
    training = None if options.train is None else str(options.train)
    files = [Path(name) for name in (options.data, training) if name and not name.startswith(HUB)]

    def make(model: GenerativeAdapter) -> Scenario:
        decoder = Decoder(model)
        return docqa(
            read_documents(options.data),
            lambda text: len(decoder.encode(text)),
            lengths,
            options.protocol,
            options.part,
            all_questions(training),
            ask_settings(options),
        )

    return evaluate(options, files, make)


def all_questions(name: str | None) -> list[Question]:
    """All questions of a file of documents; none without a file."""
    if name is None:
        return []
    return [question for context in read_documents(name).contexts for question in context.questions]


def read_documents(name: str) -> Dataset:
    """Documents with questions, in the form that the file has."""
    if not name.startswith(HUB):
        path = Path(name)
        if is_squad(path):
            return read_squad(path)
        if is_streaming_qa(path):
            return read_streaming_qa(path)
    return read_flat_qa(name)
