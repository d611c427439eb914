"""Scenario: in-context learning from demonstrations, then further items of the task (section 4.2 of the paper)."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from gakernels.data.bad_records import BadRecords
from gakernels.errors import InputError, check_known
from gakernels.evaluation.datasets import EvaluationContext, Question, Task
from gakernels.evaluation.metrics import PROTOCOLS, Sample, best_option, label_match, label_samples, value
from gakernels.evaluation.prompts import ICL_NEW_TOKENS, ICL_STOPS, demonstration_text, icl_prompt
from gakernels.evaluation.scenarios import (
    Answers,
    AskSettings,
    Cell,
    EvaluationCase,
    EvaluationRequest,
    Measurements,
    Scenario,
    sampled,
)

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (13, 21, 42, 87, 100)
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
TUNING_SHOTS = 16


@dataclass(frozen=True)
class TaskData:
    """A task for one seed.

    Attributes:
        train: the items from which demonstrations are drawn.
        test: the items to answer.
        seed: of the draw; MetaICL has a training file for each seed.
        validation: items to stop few-shot tuning early.
    """

    train: Task
    test: Task
    seed: int
    validation: tuple[Question, ...] = ()


def icl(
    tasks: Sequence[TaskData],
    shots: Sequence[int] = SHOTS,
    protocol: str = "official",
    settings: AskSettings | None = None,
) -> Scenario:
    """The scenario.

    Args:
        tasks: the tasks, with all seeds of each.
        shots: numbers of demonstrations.
        protocol: `official`: all items, labels compared up to space; `released`: the first max(16, n / 10), ignoring
            case as well.
        settings: how items are asked; the limit is a number of items for each task, number of shots and seed.

    Raises:
        InputError: there are fewer items than shots, or no such protocol or style.
    """
    settings = settings or AskSettings()
    styles = settings.styles(protocol)
    style, adapted_style = styles["style"], styles["adapted_style"]
    if not tasks:
        raise InputError("tasks must be at least one task, but there is none")
    # With the number of shots and the seed in the outer loops, the cases of one draw follow each other, one per task.
    cases: list[EvaluationCase] = []
    for count in dict.fromkeys(shots):
        for seed in dict.fromkeys(task.seed for task in tasks):
            cases += _draw([task for task in tasks if task.seed == seed], count, protocol, settings, len(cases))

    def ask(number: int, case: EvaluationCase) -> list[EvaluationRequest]:
        return [
            request
            for place, question in enumerate(case.context.questions)
            for request in _requests(number, place, question.text, question.options, style, adapted_style)
        ]

    return Scenario(
        "icl",
        protocol,
        tuple(cases),
        ask,
        _measure,
        settings.new_tokens or ICL_NEW_TOKENS,
        ICL_STOPS,
        (),
        lambda item: icl_prompt(item, None, adapted_style),
        {**styles, "shots": list(dict.fromkeys(shots))},
        _all_skipped(tasks),
        lambda cell: "items" if "task" in dict(cell) else "tasks",
        lambda item: icl_prompt(item, None, style),
    )


def _draw(
    tasks: Sequence[TaskData], shots: int, protocol: str, settings: AskSettings, first: int
) -> list[EvaluationCase]:
    """A case for each task; the other context is that of the next task."""
    cases = []
    for place, task in enumerate(tasks):
        whole = few_shot_context(task.train, task.test, shots, task.seed, protocol)
        (context,) = sampled([whole], settings.limit, settings.sample_seed)
        kind = "classification" if task.test.is_classification else "other"
        cell = (("kind", kind), ("task", task.test.name), ("shots", shots), ("seed", task.seed))
        other = first + (place + 1) % len(tasks) if len(tasks) > 1 else None
        cases.append(
            EvaluationCase(context, cell, other, task.train.items[:TUNING_SHOTS], task.validation[:TUNING_SHOTS])
        )
    return cases


def few_shot_context(train: Task, test: Task, shots: int, seed: int, protocol: str = "official") -> EvaluationContext:
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
    check_known("protocol", protocol, PROTOCOLS)
    drawn = random.Random(seed).sample(train.items, shots)
    text = demonstration_text((item.text, item.answers[0]) for item in drawn)
    return EvaluationContext(text, _scored(test.items, protocol), test.name)


def _scored(items: Sequence[Question], protocol: str) -> tuple[Question, ...]:
    return tuple(items) if protocol == "official" else tuple(items[: max(16, len(items) // 10)])


def _requests(
    number: int, place: int, item: str, options: Sequence[str], style: str, adapted_style: str
) -> list[EvaluationRequest]:
    """One request that generates a label, and one per option to rank them."""
    generated = EvaluationRequest(
        number,
        place,
        query=item,
        prompt=icl_prompt(item, None, style),
        adapted_prompt=icl_prompt(item, None, adapted_style),
    )
    return [generated, *(replace(generated, option=n, continuation=option) for n, option in enumerate(options))]


def _measure(scenario: Scenario, answers: Answers) -> Measurements:
    """Per kind of task and number of shots, one sample per task; and each task alone, whose clusters are its items: the
    answers to an item under all seeds belong together."""
    apart: dict[tuple[Cell, str], dict[Hashable, Sample]] = {}
    items: dict[Hashable, int] = {}
    for number, case in enumerate(scenario.cases):
        cell = tuple(pair for pair in case.cell if pair[0] != "seed")
        for metric, key, sample in _case_samples(case, number, answers, scenario.protocol, items):
            apart.setdefault((cell, metric), {})[key] = sample
    tasks = {task: number for number, task in enumerate(dict.fromkeys(dict(cell)["task"] for cell, _ in apart))}
    together: dict[tuple[Cell, str], dict[Hashable, Sample]] = {}
    for (cell, metric), samples in apart.items():
        task, of_kind = dict(cell)["task"], tuple(pair for pair in cell if pair[0] != "task")
        together.setdefault((of_kind, metric), {})[task] = Sample(tasks[task], value(metric, samples))
    return {**together, **apart}


def _case_samples(
    case: EvaluationCase, number: int, answers: Answers, protocol: str, items: dict[Hashable, int]
) -> Iterator[tuple[str, Hashable, Sample]]:
    """For one draw of one task, whether generated labels match, the ranking's accuracy and macro-F1: metric, key and
    sample. `items` numbers the items."""
    seed, classification = dict(case.cell)["seed"], dict(case.cell)["kind"] == "classification"
    answered = [(n, question) for n, question in enumerate(case.context.questions) if (number, n, -1) in answers]
    labels = list(dict.fromkeys(question.answers[0] for _, question in answered))
    for place, question in answered:
        item, gold = items.setdefault((question.text, question.answers), len(items)), question.answers[0]
        match = label_match(str(answers[number, place, -1]), gold, protocol)
        yield "match", (seed, place), Sample(item, match, group=seed)
        losses = [answers[number, place, option] for option in range(len(question.options))]
        if losses:
            totals, tokens = zip(*losses, strict=True)
            chosen = question.options[best_option(totals, tokens)]
            yield "ranking_accuracy", (seed, place), Sample(item, float(chosen == gold), group=seed)
        if losses and classification:
            for label, sample in label_samples(item, chosen, gold, labels, seed).items():
                yield "ranking_macro_f1", (seed, place, label), sample


def _all_skipped(tasks: Sequence[TaskData]) -> BadRecords:
    total = BadRecords()
    for task in {id(part): part for data in tasks for part in (data.train, data.test)}.values():
        total.merge(task.skipped)
    return total
