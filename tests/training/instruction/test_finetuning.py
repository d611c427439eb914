"""Instruction tuning of the demo's base model on questions about invented people, from files to the report."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from drawn_examples import drawn_example
from regression import log_of
from tiny import make_model, plain_copy
from transformers import PreTrainedModel

import gakernels.training.instruction.finetuning as finetuning
from gakernels import FormatError, GenerativeAdapter, GeneratorConfig, InputError
from gakernels.cost.memory import Recomputation, estimate_memory
from gakernels.cost.shapes import ModelShape
from gakernels.data.chat import ChatEncoder, EncodedRecord
from gakernels.data.conversations import Message
from gakernels.data.instruction_sources import InstructionSource
from gakernels.data.people import draw_document
from gakernels.demo.experiment import accuracy, answer
from gakernels.model import compilation
from gakernels.model.attachment import decoder_layers
from gakernels.model.compilation import compile_layers
from gakernels.nn import GatedMLP
from gakernels.nn.recomputed_forward import RecomputedForward
from gakernels.training.base_model import BaseConfig
from gakernels.training.instruction.answers import score_answers
from gakernels.training.instruction.batches import InstructionBatch
from gakernels.training.instruction.finetuning import finetune, make_tuned_model
from gakernels.training.instruction.recipe import (
    AnswerEvaluationConfig,
    FinetuningRecipe,
    FinetuningTrainerConfig,
    InstructionDataConfig,
)
from gakernels.training.instruction.steps import BatchConfig, InstructionSteps
from gakernels.training.plan import plan_finetuning
from gakernels.training.recipes import load_recipe
from gakernels.training.run_memory import step_setting

ASSETS = Path(finetuning.__file__).parents[2] / "demo" / "assets"
# The demo's base model knows "Question: ... Answer: ... ."; a template of that form asks it as it was trained.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }} Answer:"
    "{% else %} {{ m.content }}.{{ eos_token }}{% endif %}{% endfor %}"
)


def write_people(path: Path, count: int, seed: int, split: str = "train") -> Path:
    """Questions about invented people as JSON lines, one context with several questions a line."""
    rng = Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            document = draw_document(rng, 1, (3, 4), split)
            questions = [
                (question.split(" ", 1)[1].removesuffix(" Answer:"), said) for question, said in document.questions()
            ]
            row = {"context": document.text(), "qas": [{"question": q, "answers": [a]} for q, a in questions]}
            file.write(json.dumps(row) + "\n")
    return path


def recipe_of(people: Path, **changes: Any) -> FinetuningRecipe:
    settings: dict[str, Any] = {
        "data": InstructionDataConfig(str(people)),
        "model": BaseConfig(str(ASSETS / "base")),
        "generator": GeneratorConfig(("o_proj",), state_size=32, rank=8, scale=1.0, chunk_size=64),
        "batches": BatchConfig(batch_size=4, conversations=3),
        "trainer": FinetuningTrainerConfig(
            steps=12, learning_rate=1e-2, warmup_steps=3, log_every=4, checkpoint_every=5
        ),
        "evaluation": AnswerEvaluationConfig(contexts=6),
    }
    return FinetuningRecipe(**{**settings, **changes})


def start(recipe: FinetuningRecipe) -> GenerativeAdapter:
    model = make_tuned_model(recipe, "cpu")
    model.tokenizer.chat_template = TEMPLATE
    return model


@pytest.fixture
def people(tmp_path: Path, generator: torch.Generator) -> Path:
    return write_people(tmp_path / "people.jsonl", 40, generator.initial_seed())


def test_answers_in_another_form_are_learned_and_everything_is_written(people: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trainer = FinetuningTrainerConfig(
        steps=16, learning_rate=1e-3, warmup_steps=3, log_every=4, checkpoint_every=16, evaluate_every=8
    )
    recipe = from_the_demo(people, trainer=trainer, epochs=50.0)
    model = make_tuned_model(recipe, "cpu")
    assert model.tokenizer.chat_template is None  # so the plain one, which the demo's models have never seen
    held_out = finetuning.load_tuning_data(recipe.data, model.tokenizer, 10**6, 128, 6, 0, False).held_out
    before = score_answers(model, held_out)
    report = finetune(model, recipe, out, progress=False)
    lines = log_of(out)
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    assert set(lines[0]["loss"]) == {"answers"}
    assert lines[-1]["loss"]["answers"] < lines[0]["loss"]["answers"] - 1
    assert set(lines[1]["evaluation"]["perplexity"]) == {"none", "own", "other"}
    assert report.contexts == 6
    assert report.perplexity["own"] < 0.5 * before.perplexity["own"]
    assert report.perplexity["none"] == pytest.approx(before.perplexity["none"])
    assert report.own_over["none"][1] < 1
    assert report.own_over["other"][1] < 1
    saved = json.loads((out / "report.json").read_text())
    assert saved["answers"] == json.loads(json.dumps(report.to_dict()))
    assert (saved["data"]["contexts"], saved["data"]["held_out_contexts"]) == (34, 6)
    again = GenerativeAdapter.from_pretrained(out, base=ASSETS / "base")
    assert score_answers(again, held_out).to_dict() == report.to_dict()
    assert load_recipe(FinetuningRecipe, out / "recipe.yaml") == recipe


def from_the_demo(people: Path, **changes: Any) -> FinetuningRecipe:
    return recipe_of(people, start=str(ASSETS / "generator"), model=None, generator=None, **changes)


def test_a_generator_that_is_gone_on_with_keeps_what_it_can(people: Path, tmp_path: Path) -> None:
    trainer = FinetuningTrainerConfig(steps=4, learning_rate=1e-4, warmup_steps=0)
    recipe = from_the_demo(people, trainer=trainer)
    model = start(recipe)
    before = model.generator_fingerprint()
    report = finetune(model, recipe, tmp_path / "out", progress=False)
    assert model.generator_fingerprint() != before
    assert report.exact["own"] > 0.7
    assert report.exact["none"] < 0.3
    documents = [draw_document(Random(n), 1, (4, 4), "test") for n in range(3)]
    prompts, expected = zip(*[pair for document in documents for pair in document.questions()], strict=True)
    adapters = model.adapt([document.text() for document in documents])
    given = answer(model, prompts, [adapter for adapter in adapters for _ in range(4)])
    assert accuracy(given, expected) > 0.7


class InterruptionError(Exception):
    pass


def interrupt(model: GenerativeAdapter, recipe: FinetuningRecipe, folder: Path, step: int) -> None:
    """Run until this step and fail there."""
    plain = finetuning.InstructionObjective.batches

    def failing(self: finetuning.InstructionObjective, number: int) -> Any:
        if number == step:
            raise InterruptionError
        return plain(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning.InstructionObjective, "batches", failing)
        with pytest.raises(InterruptionError):
            finetune(model, recipe, folder, progress=False)


def test_a_resumed_run_equals_the_uninterrupted_one(people: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        people,
        batches=BatchConfig(4, 3, window=64, losses=("answers", "reconstruction", "completion")),
        generator=GeneratorConfig(("o_proj",), state_size=32, rank=8, scale=1.0, chunk_size=16),
    )
    whole = start(recipe)
    report = finetune(whole, recipe, tmp_path / "whole", progress=False)
    interrupt(start(recipe), recipe, tmp_path / "parts", 8)
    torch.manual_seed(0)  # whatever random numbers are drawn elsewhere
    resumed = start(recipe)
    assert finetune(resumed, recipe, tmp_path / "parts", progress=False) == report
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert set(log_of(tmp_path / "whole")[-1]["loss"]) == {"answers", "reconstruction", "completion"}
    ours, expected = resumed.generator_tensors(), whole.generator_tensors()
    assert all(ours[name].equal(expected[name]) for name in expected)
    other = replace(recipe, batches=replace(recipe.batches, conversations=2))
    with pytest.raises(FormatError, match=r"batches\.conversations was 3 and is 2"):
        finetune(start(other), other, tmp_path / "parts", progress=False)
    rounded = replace(recipe, model=BaseConfig(str(ASSETS / "base"), quantization="fp8"))
    with pytest.raises(FormatError, match=r"base\.quantization was None and is 'fp8'"):
        finetune(start(rounded), rounded, tmp_path / "parts", progress=False)


# How a step is run


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def quickly(base: PreTrainedModel) -> None:
        compile_layers(base, backend="aot_eager")

    monkeypatch.setattr(compilation, "compile_layers", quickly)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def few_steps(people: Path, **changes: Any) -> FinetuningRecipe:
    trainer = FinetuningTrainerConfig(steps=4, learning_rate=1e-3, warmup_steps=1, log_every=1, **changes)
    return recipe_of(
        people,
        trainer=trainer,
        generator=GeneratorConfig(("o_proj",), state_size=32, rank=8, scale=1.0, chunk_size=32),
        batches=BatchConfig(4, 3, window=64, losses=("answers", "reconstruction")),
    )


def test_overlap_and_compiled_layers_change_nothing_but_rounding(
    people: Path, tmp_path: Path, quick_compiler: None
) -> None:
    recipe = few_steps(people, evaluate_every=2)
    fast, model = replace(recipe, overlap=True, compile=True), start(recipe)
    finetune(start(recipe), recipe, tmp_path / "plain", progress=False)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        finetune(model, fast, tmp_path / "fast", progress=False)
    assert not any("forward" in vars(layer) for layer in decoder_layers(model.base)[1])
    for ours, expected in zip(log_of(tmp_path / "fast"), log_of(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_a_compiled_run_is_resumed_exactly_and_without_compilation_up_to_rounding(
    people: Path, tmp_path: Path, quick_compiler: None
) -> None:
    recipe = replace(few_steps(people, checkpoint_every=2), compile=True)
    finetune(start(recipe), recipe, tmp_path / "whole", progress=False)
    for name in ("parts", "plain"):
        interrupt(start(recipe), recipe, tmp_path / name, 3)
    finetune(start(recipe), recipe, tmp_path / "parts", progress=False)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    finetune(start(recipe), replace(recipe, compile=False), tmp_path / "plain", progress=False)
    for ours, expected in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_memory_budget_makes_layers_compute_again_or_refuses(people: Path, tmp_path: Path) -> None:
    recipe = few_steps(people)
    plan = plan_finetuning(recipe, device="cpu", progress=False)
    tight = replace(recipe, memory_budget=str(plan.memory.total - 1))
    free, model = (make_tuned_model(recipe, "cpu") for _ in range(2))  # with the template of the plan
    finetune(free, recipe, tmp_path / "free", progress=False)
    finetune(model, tight, tmp_path / "tight", progress=False)
    recomputed = [part.recompute for part in model.base.modules() if isinstance(part, GatedMLP)]
    whole = [isinstance(vars(layer).get("forward"), RecomputedForward) for layer in decoder_layers(model.base)[1]]
    chosen = plan_finetuning(tight, device="cpu", progress=False).memory.recomputed
    assert [number for number, flag in enumerate(recomputed) if flag] == list(chosen.gated)
    assert [number for number, flag in enumerate(whole) if flag] == list(chosen.whole)
    assert chosen != Recomputation()
    assert [line["loss"] for line in log_of(tmp_path / "tight")] == [line["loss"] for line in log_of(tmp_path / "free")]
    model = make_tuned_model(recipe, "cpu")
    with pytest.raises(InputError, match="memory_budget must be at least"):
        finetune(model, replace(recipe, memory_budget="1KB"), tmp_path / "none", progress=False)


def test_the_plan_has_the_memory_of_the_largest_batch(people: Path) -> None:
    recipe = few_steps(people)
    plan = plan_finetuning(recipe, device="cpu", progress=False)
    model = make_tuned_model(recipe, "cpu")
    steps = InstructionSteps(
        plan.data.sources, plan.data.weights, recipe.batches, model.config.chunk_size, seed=recipe.seed
    )
    batches = [steps.batches(number) for number in range(4)]
    accumulates = any(len(of_step) > 1 for of_step in batches)
    shape, setting = (
        ModelShape.from_config(model.base.config),
        step_setting(recipe, torch.float32, accumulates, 1, "cpu"),
    )
    shapes = [batch.shape for of_step in batches for batch in of_step]
    most = max(estimate_memory(shape, model.config, step, setting).total for step in shapes)
    assert plan.memory.total == most
    assert set(plan.fits.values()) == {Recomputation()}


# A chat template that shows the date

DAY = "{% if strftime_now is defined %}{{ ['Question', 'Answer'][strftime_now('%d') | int % 2] }} {% endif %}"
DATED = TEMPLATE.replace("{% for", DAY + "{% for", 1)


class Clock(datetime):
    """As the clock of the machine, which the test sets."""

    today = datetime(2031, 3, 4, 23, 59)

    @classmethod
    def now(cls, *_: Any) -> datetime:
        return cls.today


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(Clock, "today", Clock.today)
    for module in (finetuning, transformers.utils.chat_template_utils):
        monkeypatch.setattr(module, "datetime", Clock)
    return Clock


def dated(recipe: FinetuningRecipe) -> GenerativeAdapter:
    model = make_tuned_model(recipe, "cpu")
    model.tokenizer.chat_template = DATED
    return model


def begin(recipe: FinetuningRecipe, folder: Path) -> None:
    """A run that ends in the middle."""
    interrupt(dated(recipe), recipe, folder, 8)


def test_a_run_that_is_resumed_after_midnight_keeps_its_clock(people: Path, tmp_path: Path, clock: type[Clock]) -> None:
    recipe, whole = recipe_of(people), dated(recipe_of(people))
    report = finetune(whole, recipe, tmp_path / "whole", progress=False)
    begin(recipe, tmp_path / "parts")
    clock.today += timedelta(days=1)
    resumed = dated(recipe)
    assert finetune(resumed, recipe, tmp_path / "parts", progress=False) == report
    ours, expected = resumed.generator_tensors(), whole.generator_tensors()
    assert all(ours[name].equal(expected[name]) for name in expected)
    kept = load_recipe(FinetuningRecipe, tmp_path / "parts" / "recipe.yaml")
    assert kept == replace(recipe, clock="2031-03-04T23:59:00")
    # The recipe that was written repeats the run, on whatever day.
    assert finetune(dated(kept), kept, tmp_path / "again", progress=False) == report


def forget_what_was_given(folder: Path) -> None:
    """Make a run one of an earlier version: no clock, and of its data only the tokens in its checkpoints."""
    for path in (folder / "checkpoints").glob("*/manifest.json"):
        manifest = json.loads(json.loads(path.read_text())["manifest"])
        del manifest["settings"]["data"]["given"]
        text = json.dumps(manifest)
        path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}))
    recipe = folder / "recipe.yaml"
    recipe.write_text(re.sub(r"\nclock:.*\n", "\n", recipe.read_text()))


def test_a_run_of_an_earlier_version_is_resumed_with_the_day_on_which_it_began(
    people: Path, tmp_path: Path, clock: type[Clock]
) -> None:
    recipe, began = recipe_of(people), clock.today.timestamp()
    begin(recipe, tmp_path / "old")
    forget_what_was_given(tmp_path / "old")
    clock.today += timedelta(days=1)
    another = clock.today.timestamp()
    os.utime(tmp_path / "old" / "recipe.yaml", (another, another))
    with pytest.raises(FormatError, match=r"its tokens are others.*--set clock="):
        finetune(dated(recipe), recipe, tmp_path / "old", progress=False)  # the file is not of that day
    os.utime(tmp_path / "old" / "recipe.yaml", (began, began))
    finetune(dated(recipe), recipe, tmp_path / "old", progress=False)
    begin(recipe, tmp_path / "named")
    forget_what_was_given(tmp_path / "named")
    named = replace(recipe, clock="2031-03-05")
    finetune(dated(named), named, tmp_path / "named", progress=False)


def test_what_has_changed_in_the_data_is_named(people: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    people.rename(folder / "people.jsonl")
    write_people(folder / "more.jsonl", 9, 3)
    recipe, out = replace(recipe_of(folder), clock="2030-01-01"), tmp_path / "out"
    begin(recipe, out)

    def told(message: str, recipe: FinetuningRecipe = recipe, template: str = DATED) -> None:
        model = make_tuned_model(recipe, "cpu")
        model.tokenizer.chat_template = template
        with pytest.raises(FormatError, match=message):
            finetune(model, recipe, out, progress=False)

    told(
        r"out holds a run with other data: clock was '2030-01-01T00:00:00' and is '2031-01-02T00:00:00'\. Use",
        replace(recipe, clock="2031-01-02"),
    )
    told("other data: chat template was '[0-9a-f]+' and is '[0-9a-f]+'", template=DATED.replace("Answer", "It is"))
    few = replace(recipe, evaluation=AnswerEvaluationConfig(contexts=4))
    told(r"other data: evaluation\.contexts was 6 and is 4\.", few)
    content = (folder / "more.jsonl").read_text()
    (folder / "more.jsonl").write_text(content.replace("Answer", "answer").replace(" is ", " was "))
    told(r"other data: the source 'data' has other rows: the file more\.jsonl has other contents\.")
    (folder / "more.jsonl").rename(folder / "third.jsonl")
    told(r"other rows: the file more\.jsonl is missing; the file third\.jsonl is new")
    (folder / "third.jsonl").unlink()
    moved = folder.rename(tmp_path / "moved")
    (moved / "a.jsonl").write_text(content)  # the first by name, as it was
    elsewhere = recipe_of(moved)
    finetune(dated(elsewhere), replace(elsewhere, clock=recipe.clock), out, progress=False)


def test_data_that_other_versions_write_otherwise_is_the_same_data(people: Path, tmp_path: Path) -> None:
    recipe = recipe_of(people)
    begin(recipe, tmp_path / "out")
    for path in (tmp_path / "out" / "checkpoints").glob("*/manifest.json"):
        manifest = json.loads(json.loads(path.read_text())["manifest"])
        manifest["settings"]["data"]["tokens"] = "0" * 16
        text = json.dumps(manifest)
        path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}))
    finetune(dated(recipe), recipe, tmp_path / "out", progress=False)


def test_a_template_without_a_date_needs_no_clock(people: Path, tmp_path: Path) -> None:
    recipe = recipe_of(people)
    finetune(start(recipe), recipe, tmp_path / "out", progress=False)
    assert load_recipe(FinetuningRecipe, tmp_path / "out" / "recipe.yaml").clock is None


def test_the_template_is_stored_with_the_generator(people: Path, tmp_path: Path) -> None:
    recipe = recipe_of(people, data=InstructionDataConfig(str(people), chat_template=TEMPLATE))
    model = make_tuned_model(recipe, "cpu")
    given = model.tokenizer
    before = given.chat_template
    assert before != TEMPLATE
    finetune(model, recipe, tmp_path / "first", progress=False)
    assert given.chat_template == before
    loaded = GenerativeAdapter.from_pretrained(tmp_path / "first", plain_copy(model), given)
    asked = [Message("user", "Who?")]
    assert ChatEncoder(loaded.tokenizer).prompt(asked) == given("Question: Who? Answer:")["input_ids"]
    # Tuning that starts there writes conversations in the same way, unless its recipe says otherwise.
    more = replace(recipe_of(people), start=str(tmp_path / "first"), generator=None)
    finetune(make_tuned_model(more, "cpu"), more, tmp_path / "second", progress=False)
    assert make_tuned_model(replace(more, start=str(tmp_path / "second")), "cpu").chat_template == TEMPLATE


@pytest.mark.parametrize("text", ["2031-03-04", "2031-03-04T05:06:07", "2031-03-04 05:06:07"])
def test_a_clock_may_be_written_as_yaml_writes_times(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {{path: x}}\nstart: y\nclock: {text}\n")
    found = {load_recipe(FinetuningRecipe, path).moment, recipe_of(Path("x"), clock=text).moment}
    assert found == {datetime.fromisoformat(text)}
    with pytest.raises(InputError, match=r"clock must be a time like .*, but it is 'noon'"):
        load_recipe(FinetuningRecipe, path, ["clock=noon"])


def test_two_rounds_of_the_data_unless_fewer_steps_are_asked_for(people: Path) -> None:
    assert recipe_of(people, trainer=FinetuningTrainerConfig()).steps(101) == math.ceil(2 * 101 / 4)
    assert recipe_of(people).steps(10**6) == 12
    assert recipe_of(people, trainer=FinetuningTrainerConfig(), epochs=0.001).steps(101) == 1


def test_contexts_held_out_are_never_trained_on(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()
    plain = finetuning.InstructionObjective.losses

    def spy(self: finetuning.InstructionObjective, batch: InstructionBatch) -> Any:
        seen.update(
            tuple(ids[mask].tolist()) for ids, mask in zip(batch.context.input_ids, batch.context.mask, strict=True)
        )
        return plain(self, batch)

    monkeypatch.setattr(finetuning.InstructionObjective, "losses", spy)
    recipe = recipe_of(people, trainer=FinetuningTrainerConfig(steps=16))  # two pools of 32 contexts
    model = start(recipe)
    finetune(model, recipe, tmp_path / "out", progress=False)
    texts = [json.loads(line)["context"] for line in people.read_text().splitlines()]
    tokens = [tuple(model.tokenizer(text)["input_ids"]) for text in texts]
    assert seen == set(tokens[:-6])


def test_several_sources_and_held_out_data_of_their_own(people: Path, tmp_path: Path) -> None:
    second = write_people(tmp_path / "second.jsonl", 12, 5)
    held_out = write_people(tmp_path / "held_out.jsonl", 5, 6, "test")
    data = InstructionDataConfig(
        sources={"first": InstructionSource(str(people), 3.0), "second": InstructionSource(str(second), 1.0)},
        held_out_path=str(held_out),
    )
    recipe = recipe_of(people, data=data)
    model = start(recipe)
    read = finetuning.load_tuning_data(data, model.tokenizer, 10**6, 64, 6, progress=False)
    assert [len(source) for source in read.sources] == [40, 12]
    assert (list(read.weights), len(read.held_out)) == ([3.0, 1.0], 5)
    assert finetune(model, recipe, tmp_path / "out", progress=False).contexts == 5


def test_a_context_that_is_held_out_is_left_out_of_every_source(people: Path, tmp_path: Path) -> None:
    lines = people.read_text().splitlines(keepends=True)
    second = write_people(tmp_path / "second.jsonl", 12, 5)
    second.write_text("".join(lines[-2:]) + second.read_text())  # two contexts that the first source holds out
    sources = {"first": InstructionSource(str(people)), "second": InstructionSource(str(second))}
    tokenizer = start(recipe_of(people)).tokenizer

    def read(data: InstructionDataConfig) -> finetuning.TuningData:
        return finetuning.load_tuning_data(data, tokenizer, 10**6, 64, 6, progress=False)

    found = read(InstructionDataConfig(sources=sources))
    assert [len(source) for source in found.sources] == [37, 9]
    assert found.skipped.counts == {"context that is held out": 2}
    again = read(InstructionDataConfig(str(people), held_out_path=str(people)))  # holds its first six contexts out
    assert ([len(source) for source in again.sources], len(again.held_out)) == ([34], 6)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(lines[:3]))
    with pytest.raises(InputError, match=r"few\.jsonl has no context that is not held out: 3 x context that is held"):
        read(InstructionDataConfig(str(few), held_out_path=str(people)))


def test_data_that_can_not_be_used_is_told_before_the_first_step(people: Path, tmp_path: Path) -> None:
    model = start(recipe_of(people))

    def told(message: str, data: InstructionDataConfig, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            finetune(model, recipe_of(people, data=data, **changes), tmp_path / "out", progress=False)

    short = write_people(tmp_path / "short.jsonl", 6, 1)
    told(r"short\.jsonl has 6 contexts, and 6 of them are held out: more data", InstructionDataConfig(str(short)))
    told("there is no file or folder", InstructionDataConfig(str(tmp_path / "none")))
    limited = InstructionDataConfig(str(people), context_tokens=3)
    told(r"has no context with a conversation within the limits: 40 x context of more than 3 tokens", limited)
    told(
        "data: context 1 of data: context of more than 3",
        InstructionDataConfig(str(people), context_tokens=3, strict=True),
    )
    one = write_people(tmp_path / "one.jsonl", 1, 1)
    told("held_out_path must have at least 2 contexts", InstructionDataConfig(str(people), held_out_path=str(one)))
    many = BatchConfig(batch_size=4, group_size=2)
    with pytest.raises(InputError, match="group_size must be a multiple of the 4 processes"):
        finetune(model, recipe_of(people, batches=many), tmp_path / "out", False, finetuning.Ranks(0, 4))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="the tokenizer is that of another model"):
        finetuning.load_tuning_data(InstructionDataConfig(str(people)), model.tokenizer, 50, 64, 6, progress=False)
    model.tokenizer = None
    told("tokenizer is needed to tune on conversations", InstructionDataConfig(str(people)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"model\.name is needed if there is no generator to start from"),
        ({"start": "x"}, "generator must not be given with start"),
        ({"epochs": 0.0}, "epochs must be finite and above 0, but it is 0.0"),
        ({"seed": -1}, r"seed must be between 0 and 4294967295, but it is -1"),
        ({"parallel": "all"}, "parallel must be one of replicas, shards, but it is 'all'"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe_of(Path("x"), **changes)


def test_data_and_evaluation_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="data must have either a path or sources"):
        InstructionDataConfig()
    with pytest.raises(InputError, match="data must have either a path or sources"):
        InstructionDataConfig("x", {"y": InstructionSource("y")})
    with pytest.raises(InputError, match=r"^context_tokens must be at least 2, but it is 1"):
        InstructionDataConfig("x", context_tokens=1)
    with pytest.raises(InputError, match=r"^batch_size must be at least 2, but it is 1"):
        AnswerEvaluationConfig(batch_size=1)


# The report


def report_examples(count: int) -> list[EncodedRecord]:
    return [drawn_example(int(torch.randint(1, 20, ())), int(torch.randint(1, 5, ()))) for _ in range(count)]


def test_the_report_scores_each_answer_under_each_adapter() -> None:
    model = make_model("llama", torch.float64, torch.float64, static_rank=2)
    with torch.no_grad():
        for parameter in model.generators.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    examples = report_examples(5)
    report = score_answers(model, examples, batch_size=2)  # of 2 and 3 contexts
    owns = model.adapt([example.context.tolist() for example in examples])
    others = [owns[n] for n in (1, 0, 3, 4, 2)]
    zero = {name: torch.zeros(1, 16, 16, dtype=torch.float64) for name in model.adapted_names}
    empty = model.adapters(zero, [1]) * 5
    for name, adapters in {"own": owns, "other": others, "empty": empty, "none": [None] * 5}.items():
        total, tokens, exact, answers = 0.0, 0, 0, 0
        for example, adapter in zip(examples, adapters, strict=True):
            if adapter is not None:
                model.merge(adapter)
            for said in example.conversations:
                ids = torch.tensor(said.tokens.tolist())
                logits = model.base(input_ids=ids[None], use_cache=False).logits[0, :-1]
                counted = torch.tensor(said.answers[1:])
                total += float(F.cross_entropy(logits, ids[1:], reduction="none")[counted].sum())
                tokens += int(counted.sum())
                exact += bool((logits.argmax(-1) == ids[1:])[counted].all())
                answers += 1
            model.unmerge()
        assert report.perplexity[name] == pytest.approx(math.exp(total / tokens), rel=1e-8)
        assert report.exact[name] == pytest.approx(exact / answers)
        assert (report.tokens, report.answers, report.contexts) == (tokens, answers, 5)
    for name in ("other", "empty", "none"):
        low, high = report.own_over[name]
        assert low <= report.perplexity["own"] / report.perplexity[name] <= high


def test_a_single_context_has_no_other() -> None:
    with pytest.raises(InputError, match="examples and batch_size must be at least 2, but they are 1 and 4"):
        score_answers(make_model(), report_examples(1))
