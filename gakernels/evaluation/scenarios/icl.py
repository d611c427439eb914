"""In-context learning: a context of demonstrations, and further items of the task (section 4.2 of the paper)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from gakernels.errors import InputError
from gakernels.evaluation.cases import Answers, Case, Cell, Measurements, Request, Scenario, limited
from gakernels.evaluation.metaicl import SHOTS, Task, few_shot_context
from gakernels.evaluation.metrics import best_option, label_match, macro_f1
from gakernels.evaluation.prompts import ICL_NEW_TOKENS, ICL_STOPS, icl_prompt
from gakernels.evaluation.records import Question, Skipped
from gakernels.evaluation.samples import Sample
from gakernels.evaluation.scenarios.docqa import AskSettings

TUNING_SHOTS = 16


@dataclass(frozen=True)
class TaskData:
    """A task for one seed.

    Attributes:
        train: the items that demonstrations are drawn from.
        test: the items that are asked.
        seed: of the draw; MetaICL has a training file for each.
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
        tasks: with the seeds of each.
        shots: numbers of demonstrations.
        protocol: `official`: all items, labels equal but for space; `released`: the first max(16, n / 10), and equal
            but for case.
        settings: how items are asked; its limit is one of items, for each task, number of shots and seed.

    Raises:
        InputError: there are fewer items than shots, or no such protocol or style.
    """
    settings = settings or AskSettings()
    style, adapted_style = settings.styles(protocol)
    if not tasks:
        raise InputError("tasks must be at least one task, but there is none")
    # With the number of shots and the seed outside, the cases of one draw stand together, a task each.
    cases: list[Case] = []
    for count in dict.fromkeys(shots):
        for seed in dict.fromkeys(task.seed for task in tasks):
            cases += _draw([task for task in tasks if task.seed == seed], count, protocol, settings, len(cases))

    def ask(number: int, case: Case) -> list[Request]:
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
        {"style": style, "adapted_style": adapted_style, "shots": list(dict.fromkeys(shots))},
        _all_skipped(tasks),
    )


def _draw(tasks: Sequence[TaskData], shots: int, protocol: str, settings: AskSettings, first: int) -> list[Case]:
    """A case for each task; the other context is that of the next task."""
    cases = []
    for place, task in enumerate(tasks):
        (context,) = limited([few_shot_context(task.train, task.test, shots, task.seed, protocol)], settings.limit)
        kind = "classification" if task.test.is_classification else "other"
        cell = (("kind", kind), ("task", task.test.name), ("shots", shots), ("seed", task.seed))
        other = first + (place + 1) % len(tasks) if len(tasks) > 1 else None
        cases.append(Case(context, cell, other, task.train.items[:TUNING_SHOTS], task.validation[:TUNING_SHOTS]))
    return cases


def _requests(
    number: int, place: int, item: str, options: Sequence[str], style: str, adapted_style: str
) -> list[Request]:
    """One to generate a label, and one for each option to rank them."""
    generated = Request(
        number,
        place,
        query=item,
        prompt=icl_prompt(item, None, style),
        adapted_prompt=icl_prompt(item, None, adapted_style),
    )
    return [generated, *(replace(generated, option=n, continuation=option) for n, option in enumerate(options))]


def _measure(scenario: Scenario, answers: Answers) -> Measurements:
    """For every kind of task and number of shots a sample a task, the mean over its seeds; and each task by itself."""
    scores: dict[tuple[str, int, str, str], dict[int, float]] = {}
    for number, case in enumerate(scenario.cases):
        cell = dict(case.cell)
        for metric, value in _case_scores(case, number, answers, scenario.protocol).items():
            key = str(cell["kind"]), int(cell["shots"]), metric, str(cell["task"])
            scores.setdefault(key, {})[int(cell["seed"])] = value
    tasks = list(dict.fromkeys(task for *_, task in scores))
    together: dict[tuple[Cell, str], dict[Hashable, Sample]] = {}
    apart: dict[tuple[Cell, str], dict[Hashable, Sample]] = {}
    for (kind, shots, metric, task), by_seed in scores.items():
        mean = Sample(tasks.index(task), sum(by_seed.values()) / len(by_seed))
        together.setdefault(((("kind", kind), ("shots", shots)), metric), {})[task] = mean
        of_task = (("kind", kind), ("task", task), ("shots", shots)), metric
        apart[of_task] = {seed: Sample(seed, value) for seed, value in by_seed.items()}
    return {**together, **apart}


def _case_scores(case: Case, number: int, answers: Answers, protocol: str) -> dict[str, float]:
    """Of one draw of one task: the share of generated labels that match, and the ranking's accuracy or macro-F1."""
    matches, chosen, gold = [], [], []
    for place, question in enumerate(case.context.questions):
        if (number, place, -1) not in answers:
            continue
        matches.append(label_match(str(answers[number, place, -1]), question.answers[0], protocol))
        losses = [answers[number, place, option] for option in range(len(question.options))]
        if losses:
            totals, tokens = zip(*losses, strict=True)
            chosen.append(question.options[best_option(totals, tokens)])
            gold.append(question.answers[0])
    if not matches:
        return {}
    scores = {"match": sum(matches) / len(matches)}
    if gold:
        scores["ranking_accuracy"] = sum(map(str.__eq__, chosen, gold)) / len(gold)
        if dict(case.cell)["kind"] == "classification":
            scores["ranking_macro_f1"] = macro_f1(chosen, gold, gold_labels_only=True).value
    return scores


def _all_skipped(tasks: Sequence[TaskData]) -> dict[str, dict[str, object]]:
    total = Skipped()
    for task in {id(part): part for data in tasks for part in (data.train, data.test)}.values():
        for reason, count in task.skipped.counts.items():
            for _ in range(count):
                total.add(reason, task.skipped.first[reason])
    return vars(total)
