"""A LoRA for each context: steps on its text, and distillation of what the base says with it in its prompt."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import plain_copy
from transformers import PreTrainedModel
from worlds import answer_of, contexts, make, merged, run, scenario, text

from gakernels import Adapter, GenerativeAdapter
from gakernels.evaluation.context_tuning import LEARNING_RATES, ContextDistillation, SteppedTuning
from gakernels.evaluation.datasets import Dataset, EvaluationContext, Question
from gakernels.evaluation.methods import MethodSettings
from gakernels.evaluation.runner import METHODS
from gakernels.evaluation.scenarios import AskSettings, Scenario, docqa
from gakernels.model.static_lora import StaticLora


def made(model: GenerativeAdapter, asked: Scenario, steps: int, rate: float) -> Adapter:
    method = SteppedTuning(model, asked, MethodSettings(learning_rate=rate), steps)
    method.fit()
    adapter = method.prepare(asked.cases).adapters[0]
    assert adapter is not None
    return adapter


def text_loss(base: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return base(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]), use_cache=False).loss


def test_one_step_is_one_of_adamw() -> None:
    """From B = 0, whose gradient is the weight's times A^T: each entry moves by the learning rate."""
    model, asked = make(), scenario(1)
    adapter, start, base = made(model, asked, 1, 1e-3), StaticLora(model).double(), plain_copy(model)
    base.requires_grad_(True)
    text_loss(base, model.tokenizer(asked.cases[0].context.text)["input_ids"]).backward()
    for name in model.adapted_names:
        key = name.replace(".", "/")
        gradient = base.get_submodule(name).weight.grad @ start.lora_a[key].detach().mT
        large = gradient.abs() > 1e-3 * gradient.abs().max()
        assert torch.allclose(adapter.lora_b[name][large], -1e-3 * gradient[large].sign(), rtol=1e-2)
        assert torch.allclose(adapter.lora_a[name], start.lora_a[key].detach(), atol=1e-7)


def test_more_steps_learn_more_of_the_text() -> None:
    model, asked = make(), scenario(1)
    ids = model.tokenizer(asked.cases[0].context.text)["input_ids"]
    tuned = [merged(model, made(model, asked, steps, 3e-3)) for steps in (1, 3, 10, 30, 100)]
    with torch.no_grad():
        losses = [float(text_loss(base, ids)) for base in tuned]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def test_a_long_text_takes_no_more_steps() -> None:
    """Of 2,400 tokens there are 19 pieces: two batches in an epoch."""
    model, asked = make(), scenario(1)
    method = SteppedTuning(model, asked, MethodSettings(), 1)
    taken: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: taken.append(1))
        method.learned(text(2400), [1e-3])
        assert len(taken) == 1
        method._steps = 3
        method.learned(text(2400), [1e-3])
        assert len(taken) == 4


def answer_loss(base: PreTrainedModel, model: GenerativeAdapter, question: Question) -> float:
    """The mean loss of the answer and its end."""
    asked, answer = model.tokenizer(question.text)["input_ids"], model.tokenizer(question.answers[0])["input_ids"][1:]
    wanted = torch.tensor([*answer, model.tokenizer.eos_token_id])
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([[*asked, *wanted]]), use_cache=False).logits[0]
    return float(F.cross_entropy(logits[len(asked) - 1 : -1], wanted))


@pytest.mark.parametrize("steps", [1, 10])
def test_the_learning_rate_is_the_best_one_on_held_out_contexts(steps: int) -> None:
    model = make()
    training = [
        EvaluationContext(told, (Question(" ".join(told.split()[:3]), (told.split()[3],)),))
        for told in (text(8) for _ in range(3))
    ]
    asked = scenario(1, training=training)
    method = SteppedTuning(model, asked, MethodSettings(), steps)
    method.fit()

    def loss(rate: float) -> float:
        total = 0.0
        for context in training:
            of_context = METHODS["context_lora_1"](model, asked, MethodSettings(learning_rate=rate))
            of_context._steps = steps
            (factors,) = of_context.learned(context.text, [rate])
            base = plain_copy(model)
            for name, pair in factors.items():
                base.get_submodule(name).weight += pair.scale * (pair.lora_b[0] @ pair.lora_a[0])
            total += answer_loss(base, model, context.questions[0])
        return total

    assert method.chosen == {"learning_rate": min(LEARNING_RATES, key=loss)}
    stated = SteppedTuning(model, asked, MethodSettings(learning_rate=0.5), steps)
    stated.fit()
    assert stated.chosen == {"learning_rate": 0.5}


def test_the_choice_is_reported() -> None:
    model, asked = make(), scenario(2, training=contexts(2))
    runner = run(model, asked, "context_lora_3", "closed_book")
    tuned, closed_book = runner.method_runs()
    assert tuned.chosen["learning_rate"] in LEARNING_RATES
    assert tuned.fit_seconds > 0
    assert closed_book.chosen == {}
    (cost, _) = runner.measured_costs()
    assert cost.contextualization_seconds > 0
    assert cost.stored_bytes == made(model, asked, 1, 1e-3).bytes()


@pytest.mark.parametrize("name", ["context_lora_1", "context_lora"])
def test_it_is_asked_as_the_base_is(name: str) -> None:
    model = make()
    asked = docqa(Dataset(tuple(contexts(2))), len, None, settings=AskSettings("plain", "bare", 5))
    runner = run(model, asked, name, learning_rate=1e-2)
    method = METHODS[name](model, asked, MethodSettings(learning_rate=1e-2))
    adapters = method.prepare(asked.cases).adapters
    for number, case in enumerate(asked.cases):
        base = merged(model, adapters[number])
        for place, question in enumerate(case.context.questions):
            prompt = f"Question: {question.text}\nAnswer:"
            assert runner.log.answers(name)[number, place, -1] == answer_of(base, model, prompt)
            (pair,) = method.pairs([question])
            assert list(pair.tokens[: pair.start]) == model.tokenizer(prompt)["input_ids"]


# Distillation


def next_tokens(base: PreTrainedModel, ids: list[int], count: int) -> torch.Tensor:
    """The logarithms of the probabilities (count, vocabulary) of what follows the last tokens."""
    with torch.no_grad():
        return base(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -count:].log_softmax(-1)


def test_a_context_is_distilled() -> None:
    """Against the definition: the plain base reads context, question and answer, a plain copy with the LoRA in its
    weights question and answer alone."""
    model, asked = make(), scenario(1)
    told = asked.cases[0].context.text
    method = ContextDistillation(model, asked, MethodSettings(learning_rate=3e-3))
    questions = method.questions(told)
    assert 1 < len(questions) <= 16
    assert len(set(questions)) == len(questions)
    method.fit()
    adapter = method.prepare(asked.cases).adapters[0]
    plain, tuned = plain_copy(model), merged(model, adapter)
    before = after = 0.0
    for question, example in zip(questions, method.distilled(told, questions), strict=True):
        own = list(example.tokens)
        alone = model.tokenizer(question)["input_ids"]
        assert own[: len(alone)] == alone
        answer, count = own[len(alone) :], len(example.teacher)
        assert count == len(answer) + 1
        teacher = next_tokens(plain, model.tokenizer(f"{told}\n\n{question}")["input_ids"] + answer, count)
        assert model.tokenizer.decode(answer) == answer_of(plain, model, f"{told}\n\n{question}")
        assert torch.allclose(model.logits(example.teacher).log_softmax(-1), teacher, atol=1e-8)
        for base in (plain, tuned):
            divergence = float(F.kl_div(next_tokens(base, own, count), teacher, log_target=True, reduction="sum"))
            before, after = (before + divergence, after) if base is plain else (before, after + divergence)
    assert math.isfinite(after)
    assert after < 0.5 * before


def test_questions_differ_by_context_and_seed_and_can_be_drawn_again() -> None:
    model, asked = make(), scenario(1)

    def drawn(told: str, seed: int) -> list[str]:
        return ContextDistillation(model, asked, MethodSettings(seed=seed)).questions(told)

    one, other = text(9), text(9)
    assert drawn(one, 0) == drawn(one, 0)
    assert drawn(one, 0) != drawn(one, 1)
    assert drawn(one, 0) != drawn(other, 0)


def test_distillation_runs_as_other_methods_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gakernels.evaluation.context_tuning.DISTILLATION_STEPS", 2)
    model, asked = make(), scenario(2, training=contexts(1))
    runner = run(model, asked, "context_distillation")
    assert len(runner.log.answers("context_distillation")) == 6
    assert runner.method_runs()[0].chosen["learning_rate"] in LEARNING_RATES
    (cost,) = runner.measured_costs()
    assert cost.contextualization_seconds > 0
