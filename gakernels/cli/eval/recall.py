"""`gakernels eval recall`: invented facts, which can't be known without the context."""

import argparse
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

from gakernels.cli.common import add_command
from gakernels.cli.demo import one_thread
from gakernels.cli.eval.running import add_run_options, evaluate, numbers, refuse
from gakernels.evaluation.cases import Scenario
from gakernels.evaluation.recall_contexts import FORMS
from gakernels.evaluation.scenarios.recall import TESTS, RecallSettings, recall
from gakernels.generation.decoder import Decoder
from gakernels.model import GenerativeAdapter

WITH_TRAINING_QUESTIONS = ("sft_lora", "sft_full", "few_shot_lora", "few_shot_full")


def add_task(tasks: Any) -> None:
    """Add the task."""
    usual = RecallSettings()
    parser = add_command(
        tasks,
        "recall",
        run,
        "Facts about invented people, drawn by --seed: how many are recalled, from how long a context, from where in "
        "it, among distractors, after they changed, a single one. Without --generator: the models of the package.",
        "  gakernels eval recall --methods closed_book,prompt,adapter\n"
        "  gakernels eval recall --generator my-generator --tests length,needle --lengths 512,1024,2048,4096 "
        "--json results.json",
    )
    parser.add_argument("--tests", default=",".join(TESTS), help="with commas (default: %(default)s)")
    parser.add_argument(
        "--contexts", type=int, default=usual.contexts, help="of each cell of the results (default: %(default)s)"
    )
    for name, what in _NUMBERS.items():
        default = ",".join(map(str, getattr(usual, name)))
        parser.add_argument(f"--{name}", default=default, help=f"{what}, with commas (default: %(default)s)")
    parser.add_argument(
        "--position-length", type=int, default=usual.position_length, help="tokens, in position (default: %(default)s)"
    )
    parser.add_argument(
        "--told", type=int, default=usual.told, help="facts about the person, in other tests (default: %(default)s)"
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        default=usual.form,
        help="what is asked; a statement is to be ended (default: %(default)s)",
    )
    add_run_options(parser, "closed_book,prompt,adapter", generator_required=False)


_NUMBERS = {
    "facts": "facts about the person, in facts",
    "lengths": "tokens of a context, in length and needle",
    "distractors": "in distractors",
    "overwritten": "facts that are told anew, in overwritten",
}


def run(options: argparse.Namespace) -> int:
    """Evaluate."""
    refuse(options, WITH_TRAINING_QUESTIONS, "it has no training questions")
    settings = RecallSettings(
        tests=tuple(name.strip() for name in options.tests.split(",") if name.strip()),
        contexts=options.contexts,
        facts=tuple(numbers(options.facts, "--facts")),
        lengths=tuple(numbers(options.lengths, "--lengths")),
        position_length=options.position_length,
        distractors=tuple(numbers(options.distractors, "--distractors", least=0)),
        overwritten=tuple(numbers(options.overwritten, "--overwritten")),
        told=options.told,
        form=options.form,
        seed=options.seed,
        limit=options.limit,
    )
    embedded = options.generator is None
    if embedded:
        options.generator = Path(str(files("gakernels.demo") / "assets" / "generator"))

    def make(model: GenerativeAdapter) -> Scenario:
        decoder = Decoder(model)
        begin = len(decoder.encode(""))
        return recall(settings, lambda text: len(decoder.encode(text)) - begin)

    with one_thread() if embedded else nullcontext():
        return evaluate(options, [], make)
