"""In-context learning tasks in MetaICL's JSON lines, and the contexts that demonstrations make (docs/evaluation.md)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gakernels.errors import InputError
from gakernels.evaluation.metrics import PROTOCOLS
from gakernels.evaluation.prompts import demonstration_text
from gakernels.evaluation.records import Context, Question, Skipped, json_lines, text_of, texts_of

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (13, 21, 42, 87, 100)
SPLITS = ("train", "dev", "test")
# The test tasks of MetaICL's setting hr_to_lr (table 4 of the paper), as MetaICL's files are named.
TEST_TASKS = (
    "quarel",
    "financial_phrasebank",
    "openbookqa",
    "codah",
    "qasc",
    "glue-mrpc",
    "dream",
    "sick",
    "commonsense_qa",
    "medical_questions_pairs",
    "quartz-with_knowledge",
    "poem_sentiment",
    "quartz-no_knowledge",
    "glue-wnli",
    "climate_fever",
    "ethos-national_origin",
    "ethos-race",
    "ethos-religion",
    "ai2_arc",
    "hate_speech18",
    "glue-rte",
    "superglue-cb",
    "superglue-copa",
    "tweet_eval-hate",
    "tweet_eval-stance_atheism",
    "tweet_eval-stance_feminist",
)


@dataclass(frozen=True)
class Task:
    """The items of one file, at least one.

    Attributes:
        name: of the task.
        items: each with one gold answer, and with options where the task has them.
        skipped: what was left out.
    """

    name: str
    items: tuple[Question, ...]
    skipped: Skipped

    @property
    def is_classification(self) -> bool:
        """Whether all items have the same options: then the score is macro-F1, otherwise accuracy."""
        options = {frozenset(item.options) for item in self.items}
        return len(options) == 1 and options != {frozenset()}


def task_file(folder: Path, task: str, split: str, seed: int, shots: int = 16) -> Path:
    """Where MetaICL keeps a task: `TASK/TASK_16_SEED_SPLIT.jsonl`.

    Raises:
        InputError: there is no such split.
    """
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, but it is {split!r}")
    return folder / task / f"{task}_{shots}_{seed}_{split}.jsonl"


def read_task(path: Path) -> Task:
    """The items of a task file.

    Schema, a line: `{"task": str, "input": str, "output": str, "options": [str]}`; task and options may be missing.
    Left out and counted: lines that are no JSON object, without input or output, or whose output is not an option.

    Raises:
        InputError: there is no such file, nothing is left of it, or it mixes tasks.
    """
    items: list[Question] = []
    names: set[str] = set()
    skipped = Skipped()
    for place, entry in json_lines(path, skipped):
        given, wanted = text_of(entry.get("input")), text_of(entry.get("output"))
        options = texts_of(entry.get("options"))
        if not given or not wanted:
            skipped.add("item without input" if not given else "item without output", place)
        elif options and wanted not in options:
            skipped.add("item whose output is not among its options", place)
        else:
            names.add(text_of(entry.get("task")))
            items.append(Question(given, (wanted,), options, id=str(len(items))))
    if not items:
        raise InputError(f"{path} has no item with input and output" + (f": {skipped}" if skipped.total else ""))
    if len(names) > 1:
        raise InputError(f"{path} must hold one task, but it holds {', '.join(sorted(names))}")
    return Task(names.pop() or path.stem, tuple(items), skipped)


def few_shot_context(train: Task, test: Task, shots: int, seed: int, protocol: str = "official") -> Context:
    """Demonstrations drawn from the training items as the context, and the test items as its questions.

    Args:
        train: the items to draw from.
        test: the items to answer.
        shots: number of demonstrations.
        seed: of the draw.
        protocol: `official`: all test items; `released`: the first max(16, n / 10) of n, as the authors' code scores.

    Raises:
        InputError: shots is below 1 or more than there are items, or there is no such protocol.
    """
    if not 1 <= shots <= len(train.items):
        raise InputError(f"shots must be between 1 and the {len(train.items)} training items, but it is {shots}")
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}, but it is {protocol!r}")
    drawn = random.Random(seed).sample(train.items, shots)
    text = demonstration_text((item.text, item.answers[0]) for item in drawn)
    return Context(text, _scored(test.items, protocol), test.name)


def _scored(items: Sequence[Question], protocol: str) -> tuple[Question, ...]:
    return tuple(items) if protocol == "official" else tuple(items[: max(16, len(items) // 10)])
