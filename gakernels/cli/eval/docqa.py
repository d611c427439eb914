"""`gakernels eval docqa`: questions about documents."""

import argparse
from pathlib import Path
from typing import Any

from gakernels.cli.common import add_command
from gakernels.cli.eval.running import add_question_options, add_run_options, ask_settings, evaluate, numbers
from gakernels.evaluation.cases import Scenario
from gakernels.evaluation.decoding import Decoder
from gakernels.evaluation.records import Dataset, Question
from gakernels.evaluation.scenarios.docqa import docqa
from gakernels.evaluation.squad import PARTS, read_squad
from gakernels.evaluation.streaming_qa import read_streaming_qa
from gakernels.model import GenerativeAdapter


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
    parser.add_argument("--data", type=Path, required=True, help="SQuAD file (.json) or StreamingQA file (.csv)")
    parser.add_argument(
        "--lengths", default="512,1024,2048,4096", help="tokens of a context, with commas (default: %(default)s)"
    )
    parser.add_argument("--part", choices=PARTS, help="of the groups of documents (default: the protocol's)")
    add_run_options(parser)
    add_question_options(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate."""
    lengths = numbers(options.lengths, "--lengths")

    def make(model: GenerativeAdapter) -> Scenario:
        decoder = Decoder(model)
        return docqa(
            read_documents(options.data),
            lambda text: len(decoder.encode(text)),
            lengths,
            options.protocol,
            options.part,
            squad_questions(options.train),
            ask_settings(options),
        )

    return evaluate(options, [options.data, *([options.train] if options.train else [])], make)


def squad_questions(path: Path | None) -> list[Question]:
    """All questions of a file of documents; none without a file."""
    if path is None:
        return []
    return [question for context in read_documents(path).contexts for question in context.questions]


def read_documents(path: Path) -> Dataset:
    """Documents with questions, in the form that the ending of the file's name says."""
    return read_streaming_qa(path) if path.suffix == ".csv" else read_squad(path)
