"""Each method's answers are those of a plain model that was given the same knowledge in the plainest way."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from worlds import answer_of, contexts, make, merged, run, scenario, text

from gakernels import Adapter, FormatError, GenerativeAdapter, InputError
from gakernels.evaluation.datasets import EvaluationContext, Question
from gakernels.evaluation.methods import MethodSettings, Prepared
from gakernels.evaluation.retrieval import PassageSearch, passages
from gakernels.evaluation.runner import METHODS
from gakernels.evaluation.scenarios import EvaluationCase, Scenario, parts
from gakernels.evaluation.tuned_methods import TuningExample
from gakernels.generation import decoder as decoding
from gakernels.generation.decoder import Decoder, Row
from gakernels.model.static_lora import StaticLora, static_adapter


def expected(
    model: GenerativeAdapter, asked: Scenario, how: Callable[[EvaluationCase, str], tuple[Adapter | None, str]]
) -> dict:
    """The answers where `how` says with which adapter and prompt."""
    answers = {}
    for number, case in enumerate(asked.cases):
        for place, question in enumerate(case.context.questions):
            adapter, prompt = how(case, question.text)
            answers[number, place, -1] = answer_of(merged(model, adapter), model, prompt)
    return answers


def of_context(model: GenerativeAdapter, text: str) -> Adapter:
    return model.stream().append(text).adapter()


def streamed(model: GenerativeAdapter, text: str) -> Adapter:
    stream = model.stream()
    for part in text.split("\n\n"):
        stream.append(part)
    return stream.adapter()


def found(text: str, query: str, count: int) -> str:
    return "\n\n".join(PassageSearch(passages(text, 4)).best(query, count))


PLAIN: dict[str, Callable[[GenerativeAdapter, Scenario, EvaluationCase, str], tuple[Adapter | None, str]]] = {
    "closed_book": lambda model, asked, case, question: (None, question),
    "prompt": lambda model, asked, case, question: (None, f"{case.context.text}\n\n{question}"),
    "prompt_cached": lambda model, asked, case, question: (None, f"{case.context.text}\n\n{question}"),
    "prompt_truncated_first": lambda model, asked, case, question: (
        None,
        f"{' '.join(case.context.text.split()[:4])}\n\n{question}",
    ),
    "prompt_truncated_last": lambda model, asked, case, question: (
        None,
        f"{' '.join(case.context.text.split()[-4:])}\n\n{question}",
    ),
    "retrieval": lambda model, asked, case, question: (None, f"{found(case.context.text, question, 2)}\n\n{question}"),
    "adapter": lambda model, asked, case, question: (of_context(model, case.context.text), question),
    "adapter_merged": lambda model, asked, case, question: (of_context(model, case.context.text), question),
    "adapter_compact": lambda model, asked, case, question: (of_context(model, case.context.text), question),
    "adapter_streaming": lambda model, asked, case, question: (streamed(model, case.context.text), question),
    "adapter_retrieval": lambda model, asked, case, question: (
        of_context(model, case.context.text),
        f"{found(case.context.text, question, 2)}\n\n{question}",
    ),
    "other_adapter": lambda model, asked, case, question: (
        of_context(model, asked.cases[case.other].context.text),
        question,
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "retrieval" in name:
        pytest.importorskip("bm25s")
    monkeypatch.setattr(decoding, "LEAST_SHARED", 5)  # the starts of these prompts are short
    model, asked = make(), scenario(4)
    runner = run(model, asked, name, passages=2, passage_words=4, truncate_to=4)
    assert runner.log.answers(name) == expected(
        model, asked, lambda case, question: PLAIN[name](model, asked, case, question)
    )


def test_the_static_lora_is_the_same_for_all(tmp_path: Path) -> None:
    model, asked, path = make(), scenario(3), tmp_path / "static.safetensors"
    lora = StaticLora(model).double()
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    static_adapter(model, lora.factors()).save(path)
    runner = run(model, asked, "static_lora", static_lora=path)
    adapter = Adapter.load(path)
    assert runner.log.answers("static_lora") == expected(model, asked, lambda case, question: (adapter, question))


def test_a_static_lora_must_be_there_and_of_this_model(tmp_path: Path) -> None:
    model, other, asked = make(), make(), scenario(2)
    with pytest.raises(InputError, match="static_lora needs the file"):
        run(model, asked, "static_lora")
    other.adapt([text(9)])[0].save(tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="fingerprint"):
        run(model, asked, "static_lora", static_lora=tmp_path / "a.safetensors")


def test_the_mean_context_is_the_adapter_of_the_mean_state() -> None:
    model, training = make(), [*contexts(5), *contexts(5)[:2]]
    asked = scenario(3, training=training)
    runner = run(model, asked, "mean_context")
    states = [model.states([model.tokenizer(context.text)["input_ids"]]) for context in training]
    mean = {name: torch.cat([part[name] for part in states]).mean(0, keepdim=True) for name in model.adapted_names}
    adapter = model.adapters(mean, [0])[0]
    assert runner.log.answers("mean_context") == expected(model, asked, lambda case, question: (adapter, question))
    with pytest.raises(InputError, match="mean_context needs training contexts; name their file with --train"):
        run(model, scenario(3), "mean_context")


def losses(model: GenerativeAdapter, prepared: Prepared, case: int, examples: list[TuningExample]) -> float:
    """Of examples, with what was prepared for a case."""
    rows = [Row(example.tokens, prepared.adapters[case], example.start) for example in examples]
    with nullcontext() if prepared.weights is None else prepared.weights(case):
        return sum(loss for loss, _ in Decoder(model).losses(rows))


@pytest.mark.parametrize("name", ["sft_lora", "sft_full", "cpt_lora", "cpt_full"])
def test_tuned_models_learn_and_leave_the_base_as_it_was(name: str) -> None:
    model = make()
    asked = scenario(
        2, training=[EvaluationContext(text(5), tuple(Question(text(4), ("w9 w9 w9",)) for _ in range(30)))]
    )
    before = {key: value.clone() for key, value in model.base.state_dict().items()}
    settings = MethodSettings(learning_rate=0.02, epochs=40)
    method = METHODS[name](model, asked, settings)
    method.fit()
    prepared, base = method.prepare(asked.cases), METHODS["closed_book"](model, asked, settings).prepare(asked.cases)
    pairs = method.pairs(asked.training[0].questions)
    assert all(pair.tokens[pair.start :] == (9, 9, 9, 2) for pair in pairs)
    assert losses(model, prepared, 1, pairs) < 0.8 * losses(model, base, 1, pairs)
    assert all(torch.equal(value, before[key]) for key, value in model.base.state_dict().items())


def test_what_training_took_is_measured() -> None:
    asked = scenario(2, training=[EvaluationContext(text(5), tuple(Question(text(4), ("w9",)) for _ in range(3)))])
    runner = run(make(), asked, "sft_lora", learning_rate=0.02, epochs=1)
    assert runner.method_runs()[0].fit_seconds > 0
    assert len(runner.log.answers("sft_lora")) == 6


def test_continual_pretraining_alone_learns_the_documents() -> None:
    model, asked = make(), scenario(2)
    (method,) = (METHODS["cpt_lora"](model, asked, MethodSettings(learning_rate=0.02, epochs=20)),)
    method.fit()
    adapter = method.prepare(asked.cases).adapters[0]
    assert adapter is not None

    def loss(base: torch.nn.Module) -> float:
        rows = [model.tokenizer(document)["input_ids"] for document in asked.documents()]
        with torch.no_grad():
            return sum(
                float(base(input_ids=torch.tensor([row]), labels=torch.tensor([row]), use_cache=False).loss)
                for row in rows
            )

    assert loss(merged(model, adapter)) < 0.9 * loss(merged(model, None))


def test_supervised_tuning_needs_questions() -> None:
    with pytest.raises(InputError, match="needs training questions; name their file with --train"):
        run(make(), scenario(2), "sft_lora")


@pytest.mark.parametrize("name", ["few_shot_lora", "few_shot_full"])
def test_few_shot_tuning_trains_once_a_task(name: str) -> None:
    model = make()
    tasks = [tuple(Question(text(3), (f"w{word}",)) for _ in range(6)) for word in (11, 12)]
    cases = [
        EvaluationCase(context, (), None, tasks[number % 2], tasks[number % 2][:2])
        for number, context in enumerate(contexts(4))
    ]
    asked = Scenario("x", "official", tuple(cases), scenario(4).ask, scenario(4).measure, 2)
    method = METHODS[name](model, asked, MethodSettings(learning_rate=0.03, epochs=20))
    assert method.missing(cases[0]) is None
    assert method.missing(EvaluationCase(cases[0].context)) == "no training examples of the task"
    prepared = method.prepare(cases)
    if name == "few_shot_lora":
        assert prepared.adapters[0] is prepared.adapters[2]
        assert prepared.adapters[0] is not prepared.adapters[1]
    else:
        assert prepared.separate
    for task in (0, 1):
        pairs = method.pairs(tasks[task])
        own, other = (losses(model, prepared, case, pairs) for case in (task, 1 - task))
        assert own < other
    assert len(run(model, asked, name, learning_rate=0.03, epochs=2).log.answers(name)) == 12


def test_contexts_in_one_pass_give_what_each_gives_alone() -> None:
    model = make()
    texts = [text(words) for words in (3, 40, 7, 7, 18)] + [text(3)]
    texts.append(texts[1])
    method = METHODS["adapter"](model, scenario(1), MethodSettings(batch_tokens=20))
    for one, found in zip(texts, method.adapt(texts), strict=True):
        alone = of_context(model, one)
        for name in model.adapted_names:
            assert torch.allclose(found.delta(name), alone.delta(name), atol=1e-8)


def test_parts_are_between_empty_lines() -> None:
    assert parts("a b\nc\n\n d \n  \n\ne\n") == ["a b\nc", "d", "e"]
    assert parts("a") == ["a"]
