"""Questions about texts that a model has read: closed-book, with the text in the prompt, and from adapters."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gakernels.data.bad_records import BadRecords
from gakernels.demo.experiment import context_bytes
from gakernels.evaluation.answer_log import AnswerLog
from gakernels.evaluation.datasets import Dataset, EvaluationContext, read_flat_qa
from gakernels.evaluation.metrics import Estimate, score
from gakernels.evaluation.runner import Runner, RunSettings
from gakernels.evaluation.scenarios import AskSettings, EvaluationCase, EvaluationRequest, Scenario, docqa
from gakernels.model import GenerativeAdapter

WAYS = ("closed_book", "prompt", "adapter", "other_adapter")
BATCH_TOKENS = 4096  # keeps the memory below 3 GB with a vocabulary of 49,152


@dataclass(frozen=True)
class Reading:
    """Answers to questions about one text.

    Attributes:
        tokens: of the text.
        seconds: to form its adapter.
        adapter_bytes: of the adapter as it is kept (compact), in the dtype of the base model.
        cache_bytes: of the key-value cache that the text would have.
        answers: by way, in the order of the questions.
    """

    tokens: int
    seconds: float
    adapter_bytes: int
    cache_bytes: int
    answers: dict[str, list[str]]


def ask(model: GenerativeAdapter, text: EvaluationContext, other: EvaluationContext, new_tokens: int = 16) -> Reading:
    """Ask the questions of a text in every way; `other` is the text whose adapter is the control."""
    started = time.perf_counter()
    compact = model.stream().append(text.text).compact()
    seconds = time.perf_counter() - started
    runner = _run(model, [text, replace(other, questions=())], new_tokens, progress=False)
    found = {way: runner.log.answers(way) for way in WAYS}
    size = next(model.base.parameters()).element_size()
    return Reading(
        tokens=compact.tokens_seen,
        seconds=seconds,
        adapter_bytes=compact.numbers() * size,
        cache_bytes=context_bytes(model, text.text)["prompt"],
        answers={way: [str(found[way][0, number, -1]) for number in range(len(text.questions))] for way in WAYS},
    )


@dataclass(frozen=True)
class Scores:
    """Answers to the questions of a data set.

    Attributes:
        f1: by way.
        contextualization_seconds: per context, by way.
        question_seconds: per question, by way.
    """

    f1: dict[str, Estimate]
    contextualization_seconds: dict[str, float]
    question_seconds: dict[str, float]


def score_questions(model: GenerativeAdapter, path: Path, limit: int, new_tokens: int = 16) -> Scores:
    """Ask the questions of a file of rows {context, question, answer} in every way, at most `limit` of them."""
    runner = _run(model, read_flat_qa(str(path)).contexts, new_tokens, limit)
    f1 = {
        way: score(metric, samples)
        for way, found in runner.measurements().items()
        for (_, metric), samples in found.items()
        if metric == "f1"
    }
    runs = {run.method: run for run in runner.method_runs()}
    return Scores(
        f1,
        {way: run.contextualization_seconds for way, run in runs.items()},
        {way: run.question_seconds for way, run in runs.items()},
    )


def _run(
    model: GenerativeAdapter,
    contexts: Sequence[EvaluationContext],
    new_tokens: int,
    limit: int | None = None,
    progress: bool = True,
) -> Runner:
    asked = AskSettings("paper", "plain", new_tokens, limit)
    scenario = docqa(Dataset(tuple(contexts), BadRecords()), len, None, settings=asked)
    if model.chat_template is not None:
        scenario = replace(scenario, ask=_ask_by_template(model, scenario))
    settings = RunSettings(batch_tokens=BATCH_TOKENS, alone=0)
    runner = Runner(model, scenario, WAYS, AnswerLog(None, {}), None, settings, progress=progress)
    runner.run()
    return runner


def _ask_by_template(
    model: GenerativeAdapter, scenario: Scenario
) -> Callable[[int, EvaluationCase], list[EvaluationRequest]]:
    """Adapted models are asked as in their tuning; the base model, which was not tuned, as before."""
    assert model.tokenizer is not None
    write = model.tokenizer.apply_chat_template

    def written(request: EvaluationRequest) -> EvaluationRequest:
        message = [{"role": "user", "content": request.query}]
        return replace(request, adapted_prompt=str(write(message, tokenize=False, add_generation_prompt=True)))

    return lambda number, case: [written(request) for request in scenario.ask(number, case)]
