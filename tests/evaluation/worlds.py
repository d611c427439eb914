"""Tiny models with a tokenizer, and invented contexts with questions, for the tests of whole evaluations."""

import torch
from invented import make_tokenizer, random_text
from tiny import make_model, plain_copy
from transformers import PreTrainedModel

from gakernels import Adapter, GenerativeAdapter
from gakernels.evaluation.answer_log import AnswerLog
from gakernels.evaluation.datasets import Dataset, EvaluationContext, Question
from gakernels.evaluation.methods import MethodSettings
from gakernels.evaluation.runner import Runner, RunSettings
from gakernels.evaluation.scenarios import AskSettings, Scenario, docqa

BARE = AskSettings("bare", "bare", 5)


def make() -> GenerativeAdapter:
    """In float64, so that batches of other sizes give the same answers."""
    return make_model(base_dtype=torch.float64, dtype=torch.float64, tokenizer=make_tokenizer())


def text(words: int) -> str:
    return " ".join(random_text(words).split())


def contexts(count: int, questions: int = 3) -> list[EvaluationContext]:
    return [
        EvaluationContext(
            f"{text(7 + number)}\n\n{text(5)}",
            tuple(Question(text(3 + n), (text(1), text(2))) for n in range(questions)),
            f"c{number}",
        )
        for number in range(count)
    ]


def scenario(count: int = 5, questions: int = 3, **options: object) -> Scenario:
    """A context a case: no document is shorter than a group."""
    data = Dataset(tuple(contexts(count, questions)))
    return docqa(data, len, [1], settings=BARE, **options)


def run(
    model: GenerativeAdapter,
    asked: Scenario,
    *names: str,
    log: AnswerLog | None = None,
    settings: RunSettings | None = None,
    **method_settings: object,
) -> Runner:
    runner = Runner(
        model, asked, names, log or AnswerLog(None, {}), MethodSettings(**method_settings), settings, progress=False
    )
    runner.run()
    return runner


def merged(model: GenerativeAdapter, adapter: Adapter | None) -> PreTrainedModel:
    """A plain model with an adapter in its weights."""
    base = plain_copy(model)
    if adapter is not None:
        for name in model.adapted_names:
            base.get_submodule(name).weight += adapter.delta(name)
    return base


def answer_of(base: PreTrainedModel, model: GenerativeAdapter, prompt: str, count: int = 5) -> str:
    """Of a plain model, which reads everything again for every token."""
    ids = model.tokenizer(prompt)["input_ids"]
    new: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            token = int(base(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
            if token == model.tokenizer.eos_token_id:
                break
            new.append(token)
    return str(model.tokenizer.decode(new, skip_special_tokens=True)).strip()
