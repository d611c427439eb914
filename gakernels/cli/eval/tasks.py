"""`gakernels eval docqa | dialog | icl | perplexity | recall | haystack`: the evaluations on a model."""

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from gakernels.cli.common import add_command
from gakernels.cli.demo_people import one_thread
from gakernels.cli.eval.running import (
    Inputs,
    add_paper_option,
    add_question_options,
    add_run_options,
    add_task,
    ask_settings,
    evaluate,
    numbers,
    refuse,
)
from gakernels.data.sources import HUB
from gakernels.demo import TINY_GENERATOR
from gakernels.errors import InputError
from gakernels.evaluation.datasets import (
    MSC_QUESTIONS,
    PERSONA_CHAT_QUESTIONS,
    Dataset,
    read_documents,
    read_locomo,
    read_msc,
    read_persona_chat,
    read_task,
    task_file,
)
from gakernels.evaluation.haystack import HaystackSettings, haystack
from gakernels.evaluation.icl import SEEDS, SHOTS, TEST_TASKS, TaskData, icl
from gakernels.evaluation.perplexity import cut_documents, perplexity
from gakernels.evaluation.recall import FORMS, TESTS, RecallSettings, recall
from gakernels.evaluation.scenarios import GROUP_PARTS, Scenario, dialog, docqa
from gakernels.generation.decoder import Decoder
from gakernels.model import GenerativeAdapter
from gakernels.paths import expanded, user_path


def add_docqa(tasks: Any) -> None:
    """Add the task `docqa`."""
    parser = add_task(
        tasks,
        "docqa",
        docqa_inputs,
        "Questions about documents, grouped into contexts of given lengths: F1 and exact match.",
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
        help="tokens per context, separated by commas, or `own`: each document by itself (default: %(default)s)",
    )
    parser.add_argument("--part", choices=GROUP_PARTS, help="which groups of documents (default: the protocol's)")
    add_run_options(parser)
    add_question_options(parser)
    add_paper_option(parser, "docqa")


def docqa_inputs(options: argparse.Namespace) -> Inputs:
    """What the evaluation `docqa` reads and asks."""
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
            read_documents(training).contexts if training else (),
            ask_settings(options),
        )

    return Inputs(files, make)


DIALOG_QUESTIONS = tuple(dict.fromkeys((*MSC_QUESTIONS, *PERSONA_CHAT_QUESTIONS)))


def add_dialog(tasks: Any) -> None:
    """Add the task `dialog`."""
    parser = add_task(
        tasks,
        "dialog",
        dialog_inputs,
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
        choices=DIALOG_QUESTIONS,
        help="default: LoCoMo's own; recall for persona chat; self_instruct for Multi-Session Chat",
    )
    add_run_options(parser)
    add_question_options(parser)
    add_paper_option(parser, "dialog")


def dialog_inputs(options: argparse.Namespace) -> Inputs:
    """What the evaluation `dialog` reads and asks."""

    def make(_: GenerativeAdapter) -> Scenario:
        data, questions = read_conversations(options.data, options.questions)
        training = read_conversations(options.train, options.questions)[0].contexts if options.train else ()
        return dialog(data, questions, options.protocol, training, ask_settings(options))

    return Inputs([options.data, *([options.train] if options.train else [])], make)


def read_conversations(path: Path, questions: str | None) -> tuple[Dataset, str]:
    """The conversations of a file of any supported kind, and which questions to ask.

    Raises:
        InputError: it can't be read, or does not have such questions.
    """
    if path.suffix == ".csv":
        questions = questions or "recall"
        return read_persona_chat(path, questions), questions
    if path.suffix == ".json":
        if questions is not None:
            raise InputError(f"--questions does not apply to LoCoMo's files, which bring their own, but is {questions}")
        return read_locomo(path), "locomo"
    questions = questions or "self_instruct"
    return read_msc(path, questions), questions


def add_icl(tasks: Any) -> None:
    """Add the task `icl`."""
    parser = add_task(
        tasks,
        "icl",
        icl_inputs,
        "Tasks from demonstrations: generated answers that match, and options ranked by their loss.",
        "  gakernels eval icl --generator my-generator --data MetaICL/data --shots 1,16 --json results.json\n"
        "  gakernels eval icl --generator my-generator --data test.jsonl --train train.jsonl",
    )
    parser.add_argument(
        "--data", type=user_path, required=True, help="MetaICL's folder, or a task file of items to ask"
    )
    parser.add_argument(
        "--tasks", help="tasks of the folder, separated by commas (default: those of MetaICL's 26 that it has)"
    )
    parser.add_argument(
        "--shots", default=",".join(map(str, SHOTS)), help="numbers of demonstrations (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", default=",".join(map(str, SEEDS)), help="seeds for drawing them (default: %(default)s)"
    )
    add_run_options(parser, "closed_book,prompt,adapter")
    add_question_options(parser)
    add_paper_option(parser, "icl")


def icl_inputs(options: argparse.Namespace) -> Inputs:
    """What the evaluation `icl` reads and asks."""
    refuse(
        options,
        ("mean_context", "sft_lora", "sft_full"),
        "it has few_shot in place of supervised tuning on other questions",
    )
    shots, seeds = numbers(options.shots, "--shots"), numbers(options.seeds, "--seeds")
    files = _icl_files(options, seeds)

    def make(_: GenerativeAdapter) -> Scenario:
        read = {path: read_task(path) for paths in files.values() for path in paths}
        tasks = [
            TaskData(read[train], read[test], seed, read[dev[0]].items if dev else ())
            for (_, seed), (train, test, *dev) in files.items()
        ]
        return icl(tasks, shots, options.protocol, ask_settings(options))

    return Inputs(list(dict.fromkeys(path for paths in files.values() for path in paths)), make)


def _icl_files(options: argparse.Namespace, seeds: list[int]) -> dict[tuple[str, int], list[Path]]:
    """Training and test file of each task and seed, and the validation file if there is one."""
    if not options.data.is_dir():
        if options.train is None:
            raise InputError("--train must name the items to draw demonstrations from if --data is a file")
        return {("", seed): [options.train, options.data] for seed in seeds}
    if options.tasks is None:
        names = [name for name in TEST_TASKS if (options.data / name).is_dir()]
    else:
        names = [name.strip() for name in options.tasks.split(",")]
    if not names:
        raise InputError(f"--data: {options.data} has none of MetaICL's test tasks; name others with --tasks")
    files = {}
    for name in names:
        for seed in seeds:
            train, test, dev = (task_file(options.data, name, split, seed) for split in ("train", "test", "dev"))
            files[name, seed] = [train, test, *([dev] if dev.is_file() else [])]
    return files


ONLY_FOR_QUESTIONS = (
    "mean_context",
    "retrieval",
    "retrieval_embedding",
    "adapter_retrieval",
    "context_distillation",
    "sft_lora",
    "sft_full",
    "few_shot_lora",
    "few_shot_full",
)


def add_perplexity(tasks: Any) -> None:
    """Add the task `perplexity`."""
    parser = add_task(
        tasks,
        "perplexity",
        perplexity_inputs,
        "Perplexity of a context (reconstruction) and of the text after it (completion).",
        "  gakernels eval perplexity --generator my-generator --data validation.jsonl --json results.json",
    )
    parser.add_argument(
        "--data", type=user_path, required=True, help="text, or JSON lines with a `text` (also .gz, .xz, .bz2)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=1024,
        help="tokens of the context, and of the text after it (default: %(default)s)",
    )
    parser.add_argument(
        "--pieces",
        type=int,
        help="most pieces of a document in JSON lines, drawn at random (default: one, its start)",
    )
    add_run_options(parser, "closed_book,prompt,adapter")
    add_paper_option(parser, "perplexity")


def perplexity_inputs(options: argparse.Namespace) -> Inputs:
    """What the evaluation `perplexity` reads and asks."""
    refuse(options, ONLY_FOR_QUESTIONS, "it has no questions")

    def make(model: GenerativeAdapter) -> Scenario:
        tokenizer = Decoder(model).tokenizer
        pieces = 1 if options.pieces is None else options.pieces
        documents, skipped = cut_documents(
            options.data, tokenizer, options.tokens, options.limit, options.sample_seed, pieces
        )
        scenario = perplexity(documents, min(options.tokens, model.config.chunk_size), options.protocol)
        return replace(scenario, settings={"tokens": options.tokens, "pieces": pieces}, skipped=skipped)

    return Inputs([options.data], make)


WITH_TRAINING_QUESTIONS = ("mean_context", "sft_lora", "sft_full", "few_shot_lora", "few_shot_full")


def add_recall(tasks: Any) -> None:
    """Add the task `recall`."""
    usual = RecallSettings()
    parser = add_command(
        tasks,
        "recall",
        run_recall,
        "Recall of facts about invented people, drawn by --seed: by number of facts, length of the context, position "
        "in it, distractors, changed facts, and a single fact. Without --generator: with the models of the package.",
        "  gakernels eval recall --methods closed_book,prompt,adapter\n"
        "  gakernels eval recall --generator my-generator --tests length,needle --lengths 512,1024,2048,4096 "
        "--json results.json",
    )
    parser.add_argument("--tests", default=",".join(TESTS), help="separated by commas (default: %(default)s)")
    parser.add_argument(
        "--contexts", type=int, default=usual.contexts, help="per cell of the results (default: %(default)s)"
    )
    for name, what in _RECALL_NUMBERS.items():
        default = ",".join(map(str, getattr(usual, name)))
        parser.add_argument(f"--{name}", default=default, help=f"{what}, separated by commas (default: %(default)s)")
    parser.add_argument(
        "--position-length",
        type=int,
        default=usual.position_length,
        help="tokens per context, in test position (default: %(default)s)",
    )
    parser.add_argument(
        "--told", type=int, default=usual.told, help="facts about the person, in the other tests (default: %(default)s)"
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        default=usual.form,
        help="form of the question; a statement is to be completed (default: %(default)s)",
    )
    add_run_options(parser, "closed_book,prompt,adapter", generator_required=False)


_RECALL_NUMBERS = {
    "facts": "facts about the person, in test facts",
    "lengths": "tokens per context, in tests length and needle",
    "distractors": "distractors, in test distractors",
    "overwritten": "facts that are told again, in test overwritten",
}


def run_recall(options: argparse.Namespace) -> int:
    """Run the evaluation `recall`."""
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
        sample_seed=options.sample_seed,
    )
    embedded = options.generator is None
    if embedded:
        options.generator = TINY_GENERATOR

    def make(model: GenerativeAdapter) -> Scenario:
        decoder = Decoder(model)
        begin = len(decoder.encode(""))
        return recall(settings, lambda text: len(decoder.encode(text)) - begin)

    with one_thread() if embedded else nullcontext():
        return evaluate(options, Inputs([], make))


def add_haystack(tasks: Any) -> None:
    """Add the task `haystack`."""
    parser = add_task(
        tasks,
        "haystack",
        haystack_inputs,
        "A needle in a haystack: one number, drawn by --seed, in a text of so many tokens that says nothing else.",
        "  gakernels eval haystack --generator my-generator --lengths 1024,8192,32768 --json results.json",
    )
    parser.add_argument(
        "--lengths",
        default="1024,2048,4096,8192",
        help="tokens per context, separated by commas (default: %(default)s)",
    )
    usual = HaystackSettings.contexts
    parser.add_argument(
        "--contexts",
        type=int,
        default=usual,
        help="per length, the needle in each tenth of the text equally often (default: %(default)s)",
    )
    add_run_options(parser, "closed_book,prompt,adapter")
    add_question_options(parser, training=False)


def haystack_inputs(options: argparse.Namespace) -> Inputs:
    """What the evaluation `haystack` asks."""
    refuse(options, WITH_TRAINING_QUESTIONS, "it has no training questions")
    drawn = HaystackSettings(tuple(numbers(options.lengths, "--lengths")), options.contexts, options.seed)

    def make(model: GenerativeAdapter) -> Scenario:
        decoder = Decoder(model)
        return haystack(drawn, lambda text: len(decoder.encode(text)), options.protocol, ask_settings(options))

    return Inputs([], make)
