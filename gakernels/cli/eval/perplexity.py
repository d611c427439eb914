"""`gakernels eval perplexity`: of a context, and of what follows it."""

import argparse
from dataclasses import replace
from typing import Any

from gakernels.cli.common import add_command
from gakernels.cli.eval.running import add_run_options, evaluate, refuse
from gakernels.evaluation.cases import Scenario
from gakernels.evaluation.scenarios.perplexity import perplexity
from gakernels.evaluation.text_documents import cut_documents
from gakernels.generation.decoder import Decoder
from gakernels.model import GenerativeAdapter
from gakernels.paths import user_path

ONLY_FOR_QUESTIONS = ("retrieval", "adapter_retrieval", "sft_lora", "sft_full", "few_shot_lora", "few_shot_full")


def add_task(tasks: Any) -> None:
    """Add the task."""
    parser = add_command(
        tasks,
        "perplexity",
        run,
        "Perplexity of a context (reconstruction) and of the text behind it (completion), which is not in the prompt.",
        "  gakernels eval perplexity --generator my-generator --data validation.jsonl --json results.json",
    )
    parser.add_argument(
        "--data", type=user_path, required=True, help="text, or JSON lines with a `text` (also .gz, .xz, .bz2)"
    )
    parser.add_argument(
        "--tokens", type=int, default=1024, help="of the context, and of what follows (default: %(default)s)"
    )
    add_run_options(parser, "closed_book,prompt,adapter")


def run(options: argparse.Namespace) -> int:
    """Evaluate."""
    refuse(options, ONLY_FOR_QUESTIONS, "it has no questions")

    def make(model: GenerativeAdapter) -> Scenario:
        documents, skipped = cut_documents(options.data, Decoder(model).tokenizer, options.tokens, options.limit)
        scenario = perplexity(
            [(document.text, document.name) for document in documents],
            [(document.context, document.following) for document in documents],
            min(options.tokens, model.config.chunk_size),
            options.protocol,
        )
        return replace(scenario, settings={"tokens": options.tokens}, skipped=vars(skipped))

    return evaluate(options, [options.data], make)
