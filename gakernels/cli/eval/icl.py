"""`gakernels eval icl`: learning from demonstrations."""

import argparse
from pathlib import Path
from typing import Any

from gakernels.cli.common import add_command
from gakernels.cli.eval.running import add_question_options, add_run_options, ask_settings, evaluate, numbers, refuse
from gakernels.errors import InputError
from gakernels.evaluation.cases import Scenario
from gakernels.evaluation.metaicl import SEEDS, SHOTS, TEST_TASKS, read_task, task_file
from gakernels.evaluation.scenarios.icl import TaskData, icl
from gakernels.model import GenerativeAdapter
from gakernels.paths import user_path


def add_task(tasks: Any) -> None:
    """Add the task."""
    parser = add_command(
        tasks,
        "icl",
        run,
        "Tasks from demonstrations: generated answers that match, and options ranked by their loss.",
        "  gakernels eval icl --generator my-generator --data MetaICL/data --shots 1,16 --json results.json\n"
        "  gakernels eval icl --generator my-generator --data test.jsonl --train train.jsonl",
    )
    parser.add_argument(
        "--data", type=user_path, required=True, help="MetaICL's folder, or a task file of items to ask"
    )
    parser.add_argument("--tasks", help="of the folder, with commas (default: MetaICL's 26 that are there)")
    parser.add_argument("--shots", default=",".join(map(str, SHOTS)), help="demonstrations (default: %(default)s)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of their draw (default: %(default)s)")
    add_run_options(parser, "closed_book,prompt,adapter")
    add_question_options(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate."""
    refuse(options, ("sft_lora", "sft_full"), "it has few_shot in place of supervised tuning on other questions")
    shots, seeds = numbers(options.shots, "--shots"), numbers(options.seeds, "--seeds")
    files = _files(options, seeds)

    def make(_: GenerativeAdapter) -> Scenario:
        read = {path: read_task(path) for paths in files.values() for path in paths}
        tasks = [
            TaskData(read[train], read[test], seed, read[dev[0]].items if dev else ())
            for (_, seed), (train, test, *dev) in files.items()
        ]
        return icl(tasks, shots, options.protocol, ask_settings(options))

    return evaluate(options, list(dict.fromkeys(path for paths in files.values() for path in paths)), make)


def _files(options: argparse.Namespace, seeds: list[int]) -> dict[tuple[str, int], list[Path]]:
    """Training and test file of each task and seed, and the one for validation where there is one."""
    if not options.data.is_dir():
        if options.train is None:
            raise InputError("--train must name the items to draw demonstrations from, where --data is a file")
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
