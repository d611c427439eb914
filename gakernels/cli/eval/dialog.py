"""`gakernels eval dialog`: questions about earlier conversations."""

import argparse
from pathlib import Path
from typing import Any

from gakernels.cli.common import add_command
from gakernels.cli.eval.running import add_question_options, add_run_options, ask_settings, evaluate
from gakernels.errors import InputError
from gakernels.evaluation import locomo, msc, persona_chat
from gakernels.evaluation.cases import Scenario
from gakernels.evaluation.records import Dataset
from gakernels.evaluation.scenarios.dialog import dialog
from gakernels.model import GenerativeAdapter
from gakernels.paths import user_path

QUESTIONS = tuple(dict.fromkeys((*msc.QUESTIONS, *persona_chat.QUESTIONS)))


def add_task(tasks: Any) -> None:
    """Add the task."""
    parser = add_command(
        tasks,
        "dialog",
        run,
        "Questions about what was said in earlier conversations: F1 and exact match.",
        "  gakernels eval dialog --generator my-generator --data msc_self_instruct.jsonl --json results.json",
    )
    parser.add_argument(
        "--data",
        type=user_path,
        required=True,
        help="LoCoMo (.json), Synthetic-Persona-Chat (.csv), else Multi-Session Chat or MSC-Self-Instruct (JSON lines)",
    )
    parser.add_argument(
        "--questions",
        choices=QUESTIONS,
        help="default: LoCoMo's own; recall for persona chat; self_instruct for Multi-Session Chat",
    )
    add_run_options(parser)
    add_question_options(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate."""

    def make(_: GenerativeAdapter) -> Scenario:
        data, questions = read(options.data, options.questions)
        training = [] if options.train is None else read(options.train, options.questions)[0].contexts
        pairs = [question for context in training for question in context.questions]
        return dialog(data, questions, options.protocol, pairs, ask_settings(options))

    return evaluate(options, [options.data, *([options.train] if options.train else [])], make)


def read(path: Path, questions: str | None) -> tuple[Dataset, str]:
    """The conversations of a file of any of the kinds, and which questions are asked.

    Raises:
        InputError: it can't be read, or does not have such questions.
    """
    if path.suffix == ".csv":
        questions = questions or "recall"
        return persona_chat.read_persona_chat(path, questions), questions
    if path.suffix == ".json":
        if questions is not None:
            raise InputError(f"--questions does not apply to LoCoMo's files, which bring their own, but is {questions}")
        return locomo.read_locomo(path), "locomo"
    questions = questions or "self_instruct"
    return msc.read_msc(path, questions), questions
