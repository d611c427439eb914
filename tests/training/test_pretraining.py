"""Pretraining from text files to the report."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from invented import make_tokenizer, random_text
from regression import InterruptionError, log_of
from tiny import make_base, make_config
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gakernels import Adapter, FormatError, GenerativeAdapter, InputError
from gakernels.cost.memory import StepShape, estimate_memory
from gakernels.cost.shapes import ModelShape
from gakernels.model import compilation
from gakernels.model.attachment import decoder_layers
from gakernels.model.compilation import compile_layers
from gakernels.nn import GatedMLP
from gakernels.nn.recomputed_forward import RecomputedForward
from gakernels.training import pretraining
from gakernels.training.base_model import BaseConfig
from gakernels.training.distillation import Distillation
from gakernels.training.perplexity import context_perplexity
from gakernels.training.pretraining import make_model, pretrain, segment_windows
from gakernels.training.pretraining_data import DataConfig, HeldOutSize, PretrainingData, load_data
from gakernels.training.pretraining_recipe import EvaluationConfig, PretrainingRecipe, WindowsConfig
from gakernels.training.recipes import load_recipe
from gakernels.training.run_memory import step_setting
from gakernels.training.trainer import TrainerConfig

CHUNK, CHUNKS, CONTEXTS = 16, 2, 4


@pytest.fixture(autouse=True)
def token_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(random_text(300))
    return folder


def start(base: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerFast | None = None) -> GenerativeAdapter:
    """The same untrained generator at each call on the same base."""
    return GenerativeAdapter(
        make_base() if base is None else base, make_config(chunk_size=CHUNK), tokenizer or make_tokenizer()
    )


def make_recipe(data: Path, /, **changes: Any) -> PretrainingRecipe:
    """A run of a moment; the trainer's settings and those of the sections are given by name."""
    optimiser = {"steps": 30, "learning_rate": 0.02, "warmup_steps": 3, "log_every": 5, "checkpoint_every": 10}
    windows = {"chunks": CHUNKS, "batch_size": 4, **changes.pop("windows", {})}
    evaluation = {"contexts": CONTEXTS, **changes.pop("evaluation", {})}
    return PretrainingRecipe(
        model=BaseConfig("tiny"),
        data=DataConfig(str(data), **changes.pop("data", {})),
        trainer=TrainerConfig(**{**optimiser, **changes.pop("trainer", {})}),
        generator=make_config(chunk_size=CHUNK, **changes.pop("generator", {})),
        windows=WindowsConfig(**windows),
        evaluation=EvaluationConfig(**evaluation),
        **changes,
    )


def read(recipe: PretrainingRecipe) -> PretrainingData:
    held_out = HeldOutSize(recipe.evaluation.contexts, recipe.segment_tokens)
    return load_data(recipe.data, make_tokenizer(), 64, recipe.segment_tokens, held_out, False)


def test_both_losses_fall_and_everything_is_written(data: Path, tmp_path: Path) -> None:
    model, out = start(), tmp_path / "out"
    model.base.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    model.base.config.name_or_path = str(tmp_path / "base")
    recipe = make_recipe(data, evaluation={"static_lora": True}, trainer={"evaluate_every": 10})
    report = pretrain(model, recipe, out, progress=False)
    for lines in (log_of(out), log_of(out / "static_lora")):
        assert [line["step"] for line in lines] == list(range(5, 31, 5))
        for name in ("reconstruction", "completion"):
            assert lines[-1]["loss"][name] < lines[0]["loss"][name] - 0.1
    assert all(json.loads(line)["tokens_per_second"] > 0 for line in (out / "log.jsonl").read_text().splitlines())
    assert json.loads((out / "report.json").read_text()) == report.to_dict()
    assert report.completion is not None
    for task in (report.reconstruction, report.completion):
        assert set(task.perplexity) == {"none", "own", "other", "static_lora"}
        assert task.perplexity["own"] < task.perplexity["none"]
    assert report.contexts == CONTEXTS
    assert report.context_tokens == CHUNK * CHUNKS
    control = Adapter.load(out / "static_lora.safetensors")
    with model.adapted(control):
        assert set(control.lora_a) == set(model.adapted_names)
    assert load_recipe(PretrainingRecipe, out / "recipe.yaml") == recipe
    again = GenerativeAdapter.from_pretrained(out)
    scored = context_perplexity(again, read(recipe).held_out, CHUNKS)
    for name in ("none", "own", "other"):
        assert scored.reconstruction.perplexity[name] == report.reconstruction.perplexity[name]


def test_evaluations_at_intervals_score_some_of_the_contexts_and_change_nothing(data: Path, tmp_path: Path) -> None:
    one, two = (start(base) for base in copies(make_base(), 2))
    plain = make_recipe(data, trainer={"steps": 10})
    watched = make_recipe(data, trainer={"steps": 10, "evaluate_every": 4}, evaluation={"contexts_at_intervals": 2})
    assert pretrain(one, watched, tmp_path / "one", progress=False) == pretrain(
        two, plain, tmp_path / "two", progress=False
    )
    evaluations = {line["step"]: line["evaluation"] for line in log_of(tmp_path / "one") if "evaluation" in line}
    assert set(evaluations) == {4, 8}
    assert all(values["contexts"] == 2 for values in evaluations.values())
    assert all(set(values["completion"]["perplexity"]) == {"none", "own", "other"} for values in evaluations.values())


def test_data_held_out_is_never_trained_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    plain = pretraining.window_losses

    def spy(model: GenerativeAdapter, batch: Any) -> Any:
        seen.extend(batch.input_ids[:, :CHUNKS].flatten(1))
        return plain(model, batch)

    monkeypatch.setattr(pretraining, "window_losses", spy)
    recipe = make_recipe(data, trainer={"steps": 9})
    parts = read(recipe)
    pretrain(start(), recipe, tmp_path / "out", progress=False)
    trained = {tuple(row.tolist()) for row in seen}
    assert len(parts.segments) < 36  # all that 9 steps take
    assert trained == {tuple(row.tolist()) for row in parts.segments.take(range(len(parts.segments)))}
    scored = torch.cat([parts.held_out.contexts, parts.held_out.continuations])
    assert not trained & {tuple(row.tolist()) for row in scored}


def test_micro_batches_change_nothing_but_rounding(data: Path, tmp_path: Path) -> None:
    one, two = (start(base) for base in copies(make_base(), 2))
    whole = make_recipe(data, trainer={"steps": 3, "log_every": 1})
    parts = replace(whole, windows=replace(whole.windows, segments_at_once=1))
    pretrain(one, whole, tmp_path / "whole", progress=False)
    pretrain(two, parts, tmp_path / "parts", progress=False)
    for ours, expected in zip(log_of(tmp_path / "parts"), log_of(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_overlap_and_compiled_layers_change_nothing_but_rounding(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quickly(base: PreTrainedModel) -> None:
        compile_layers(base, backend="aot_eager")

    monkeypatch.setattr(compilation, "compile_layers", quickly)
    one, two = (start(base) for base in copies(make_base(), 2))
    recipe = make_recipe(data, trainer={"steps": 3, "log_every": 1})
    pretrain(one, recipe, tmp_path / "plain", progress=False)
    pretrain(two, replace(recipe, overlap=True, compile=True), tmp_path / "fast", progress=False)
    assert not any("forward" in vars(layer) for layer in decoder_layers(two.base)[1])
    for ours, expected in zip(log_of(tmp_path / "fast"), log_of(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_a_base_in_bfloat16_trains_under_autocast(data: Path, tmp_path: Path) -> None:
    model = start(make_base().bfloat16())
    recipe = make_recipe(data, trainer={"steps": 6, "log_every": 3, "precision": "bfloat16", "evaluate_every": 3})
    report = pretrain(model, recipe, tmp_path / "out", progress=False)
    assert all(parameter.dtype == torch.float32 for parameter in model.generators.parameters())
    assert report.reconstruction.perplexity["own"] < report.reconstruction.perplexity["none"]
    evaluated = log_of(tmp_path / "out")[-1]["evaluation"]
    assert evaluated == report.to_dict()  # the same contexts: all of them


def test_a_loss_can_be_left_out(data: Path, tmp_path: Path) -> None:
    recipe = make_recipe(data, trainer={"steps": 20, "loss_weights": (("completion", 0.0),)})
    pretrain(start(), recipe, tmp_path / "out", progress=False)
    lines = log_of(tmp_path / "out")
    assert lines[-1]["loss"]["reconstruction"] < lines[0]["loss"]["reconstruction"]


def test_the_first_steps_can_take_every_chunk_as_a_segment(data: Path, tmp_path: Path) -> None:
    windows = {"single_share": 0.5, "plain": True}
    recipe = make_recipe(data, windows=windows, generator={"static_rank": 2}, trainer={"steps": 8, "log_every": 2})
    model = GenerativeAdapter(make_base(), recipe.generator, make_tokenizer())
    pretrain(model, recipe, tmp_path / "out", progress=False)
    losses = [list(line["loss"]) for line in log_of(tmp_path / "out")]
    assert losses == 2 * [["reconstruction", "plain"]] + 2 * [["reconstruction", "completion", "plain"]]


def test_the_context_can_be_distilled(data: Path, tmp_path: Path) -> None:
    weights = (("distillation", 2.0), ("reconstruction", 0.0))
    recipe = make_recipe(
        data,
        trainer={"steps": 6, "log_every": 3, "loss_weights": weights},
        evaluation={"static_lora": True},
        distillation=Distillation(top_k=5),
    )
    pretrain(start(), recipe, tmp_path / "out", progress=False)
    assert all(line["loss"]["distillation"] > 0 for line in log_of(tmp_path / "out"))
    assert all(set(line["loss"]) == {"reconstruction", "completion"} for line in log_of(tmp_path / "out/static_lora"))


def test_a_memory_budget_makes_layers_compute_again_or_refuses(data: Path, tmp_path: Path) -> None:
    one, two, three = (start(base) for base in copies(make_base(), 3))
    recipe = make_recipe(data, trainer={"steps": 2, "log_every": 1})
    pretrain(one, recipe, tmp_path / "free", progress=False)
    step = StepShape.pretraining(4, CHUNK, CHUNKS)
    shape = ModelShape.from_config(two.base.config)
    free = estimate_memory(shape, two.config, step, step_setting(recipe, torch.float32, False, 1, "cpu"))
    tight = replace(recipe, memory_budget=str(free.total - 1))
    pretrain(two, tight, tmp_path / "tight", progress=False)
    assert [recomputes(layer) for layer in decoder_layers(one.base)[1]] == [False] * 3
    assert [recomputes(layer) for layer in decoder_layers(two.base)[1]] == [True, False, False]
    assert losses_of(tmp_path / "tight") == losses_of(tmp_path / "free")
    with pytest.raises(InputError, match="memory_budget must be at least"):
        pretrain(three, replace(recipe, memory_budget="1KB"), tmp_path / "none", progress=False)


def recomputes(layer: nn.Module) -> bool:
    parts = [part.recompute for part in layer.modules() if isinstance(part, GatedMLP)]
    return any(parts) or isinstance(vars(layer).get("forward"), RecomputedForward)


def test_the_windows_of_a_segment_and_of_its_chunks() -> None:
    segment, windows = torch.arange(12), WindowsConfig(chunks=3, reconstruction="copy", plain=True)
    whole = segment_windows(segment, windows, False, torch.Generator())
    assert whole.input_ids.flatten().tolist() == [*range(12), *range(12)]
    assert whole.seen == (0, 1, 2, 1, 2, 3)
    assert whole.targets["plain"].nonzero().tolist() == [[0, 0, place] for place in (1, 2, 3)]
    assert int(whole.targets["completion"].sum()) == 2 * 3
    parts = segment_windows(segment, windows, True, torch.Generator())
    assert parts.input_ids.tolist() == [[[*range(n, n + 4)]] * 2 for n in (0, 4, 8)]
    assert parts.seen == (0, 1)
    assert list(parts.targets) == list(whole.targets)
    assert not parts.targets["completion"].any()
    one = segment_windows(segment, WindowsConfig(chunks=1), False, torch.Generator())
    assert list(one.targets) == ["reconstruction"]


@pytest.mark.parametrize("stage", ["generator", "static_lora"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    models = [start(base) for base in copies(make_base(), 3)]
    steps = {"steps": 11, "log_every": 4, "checkpoint_every": 5}
    recipe = make_recipe(data, evaluation={"static_lora": True}, trainer=steps)
    whole = pretrain(models[0], recipe, tmp_path / "whole", progress=False)
    target = pretraining if stage == "generator" else pretraining.StaticLora
    plain, calls = target.window_losses, iter(range(7))

    def failing(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise InterruptionError
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(target, "window_losses", failing)
        with pytest.raises(InterruptionError):
            pretrain(models[1], recipe, tmp_path / "parts", progress=False)
    torch.manual_seed(0)  # whatever random numbers are drawn elsewhere
    assert pretrain(models[2], recipe, tmp_path / "parts", progress=False) == whole
    ours, expected = models[2].generator_tensors(), models[0].generator_tensors()
    assert all(ours[name].equal(expected[name]) for name in expected)
    for folder in ("", "static_lora"):
        assert losses_of(tmp_path / "parts" / folder) == losses_of(tmp_path / "whole" / folder)


def losses_of(folder: Path) -> list[Any]:
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in log_of(folder)]


def copies(base: PreTrainedModel, count: int) -> Iterator[PreTrainedModel]:
    for _ in range(count):
        copy = make_base()
        copy.load_state_dict(base.state_dict())
        yield copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": {"batch_size": 3}}, r"windows\.batch_size was 4 and is 3"),
        ({"seed": 1}, r"seed was 0 and is 1"),
        ({"windows": {"reconstruction": "copy"}}, r"windows\.reconstruction was 'random_slice' and is 'copy'"),
        ({"trainer": {"steps": 1, "weight_decay": 0.5}}, r"trainer\.weight_decay was 0\.01 and is 0\.5"),
        ({"data": {"within_documents": True}}, r"data\.segments was"),
    ],
)
def test_a_run_with_other_settings_is_not_gone_on_with(
    data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    first, second = (start(base) for base in copies(make_base(), 2))
    changes = {"trainer": {"steps": 1}, **changes}
    pretrain(first, make_recipe(data, trainer={"steps": 1}), tmp_path / "out", progress=False)
    before = (tmp_path / "out" / "recipe.yaml").read_text()
    with pytest.raises(FormatError, match=message):
        pretrain(second, make_recipe(data, **changes), tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "recipe.yaml").read_text() == before


def test_other_data_base_or_generator_are_refused(data: Path, tmp_path: Path) -> None:
    one, two, three = copies(make_base(), 3)
    recipe, out = make_recipe(data, trainer={"steps": 1}), tmp_path / "out"
    pretrain(start(one), recipe, out, progress=False)
    other = GenerativeAdapter(two, replace(make_config(chunk_size=CHUNK), power_iterations=2), make_tokenizer())
    with pytest.raises(FormatError, match=r"generator\.power_iterations was 1 and is 2"):
        pretrain(other, recipe, out, progress=False)
    with pytest.raises(FormatError, match=r"base\.fingerprint was"):
        pretrain(start(), recipe, out, progress=False)
    (data / "0.txt").write_text(random_text(300))
    with pytest.raises(FormatError, match=r"data\.segments was"):
        pretrain(start(three), recipe, out, progress=False)


def test_the_same_data_in_another_place_can_be_gone_on_with(data: Path, tmp_path: Path) -> None:
    first, second = (start(base) for base in copies(make_base(), 2))
    steps = {"steps": 1}
    report = pretrain(first, make_recipe(data, trainer=steps), tmp_path / "out", progress=False)
    moved = data.rename(tmp_path / "elsewhere")
    recipe = make_recipe(moved, trainer=steps, evaluation={"batch_size": 3})
    again = pretrain(second, recipe, tmp_path / "out", progress=False)
    assert again.reconstruction.perplexity == pytest.approx(report.reconstruction.perplexity, rel=1e-4)
    assert load_recipe(PretrainingRecipe, tmp_path / "out" / "recipe.yaml") == recipe


def test_a_run_starts_from_another_generator(data: Path, tmp_path: Path) -> None:
    base, tokenizer = make_base(), make_tokenizer()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    first = replace(make_recipe(data, trainer={"steps": 10}), model=BaseConfig(str(tmp_path / "base")))
    pretrain(make_model(first, "cpu"), first, tmp_path / "first", progress=False)
    longer = replace(first, start=str(tmp_path / "first"), generator=make_config(chunk_size=2 * CHUNK))
    model = make_model(longer, "cpu")
    before = GenerativeAdapter.from_pretrained(tmp_path / "first")
    assert model.generator_fingerprint() == before.generator_fingerprint()
    pretrain(model, longer, tmp_path / "second", progress=False)
    after = GenerativeAdapter.from_pretrained(tmp_path / "second")
    assert after.config == longer.generator
    assert after.generator_fingerprint() != before.generator_fingerprint()
    pretrain(make_model(longer, "cpu"), longer, tmp_path / "second", progress=False)  # resumed at its end
    shutil.copytree(tmp_path / "second", tmp_path / "first", dirs_exist_ok=True)
    with pytest.raises(FormatError, match="start"):  # it is another generator now
        pretrain(make_model(longer, "cpu"), longer, tmp_path / "second", progress=False)
    wider = replace(longer, generator=make_config(chunk_size=CHUNK, rank=3))
    with pytest.raises(InputError, match=r"generator\.rank must be \d+, as in the generator .*first\), but it is 3"):
        make_model(wider, "cpu")


def test_a_model_without_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    model = GenerativeAdapter(make_base(), make_config(chunk_size=CHUNK))
    with pytest.raises(InputError, match="tokenizer is needed to pretrain on text"):
        pretrain(model, make_recipe(data), tmp_path / "out", progress=False)


def test_chunks_longer_than_the_base_model_reads_are_refused(data: Path, tmp_path: Path) -> None:
    model = start()
    model.base.config.max_position_embeddings = CHUNK - 1
    with pytest.raises(InputError, match="chunk_size must be at most the 15 positions of the base model, but it is 16"):
        pretrain(model, make_recipe(data), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_chunks_of_one_token_are_refused(data: Path) -> None:
    recipe = make_recipe(data)
    with pytest.raises(InputError, match="chunk_size must be at least 2 to train on next tokens, but it is 1"):
        replace(recipe, generator=replace(recipe.generator, chunk_size=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": {"chunks": 0}}, "chunks must be at least 1, but it is 0"),
        ({"windows": {"batch_size": 0}}, "batch_size must be at least 1, but it is 0"),
        ({"windows": {"single_share": 1.5}}, "single_share must be between 0 and 1, but it is 1.5"),
        ({"windows": {"plain": True}}, r"windows\.plain needs a generator\.static_rank above 0"),
        ({"windows": {"segments_at_once": 0}}, "segments_at_once must be at least 1, but it is 0"),
        ({"windows": {"reconstruction": "all"}}, "reconstruction must be one of .*, but it is 'all'"),
        ({"evaluation": {"contexts": 1}}, "^contexts must be at least 2, but it is 1"),
        ({"evaluation": {"context_chunks": 0}}, "^context_chunks must be at least 1, but it is 0"),
        ({"evaluation": {"batch_size": 0}}, "^batch_size must be at least 1, but it is 0"),
        ({"seed": -1}, r"seed must be between 0 and 4294967295, but it is -1"),
        ({"parallel": "both"}, "parallel must be one of replicas, shards, but it is 'both'"),
        ({"overlap": True, "parallel": "shards"}, "overlap must be false with parallel: shards"),
        ({"memory_budget": "much"}, "a memory budget must be .*, but it is 'much'"),
        ({"data": {"held_out_path": "a", "held_out_every": 2}}, "must not both be given"),
        ({"data": {"held_out_every": 1}}, "^held_out_every must be at least 2, but it is 1"),
        (
            {
                "evaluation": {"static_lora": True},
                "trainer": {"loss_weights": (("reconstruction", 0.0), ("completion", 0.0))},
                "distillation": Distillation(),
            },
            "static_lora needs a loss of the text, but trainer.loss_weights leaves out reconstruction, completion",
        ),
    ],
)
def test_a_setting_out_of_range_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_recipe(tmp_path, **changes)


@pytest.mark.parametrize(
    ("windows", "world", "message"),
    [
        ({"batch_size": 4}, 3, "batch_size must be a multiple of the number of processes, 3, but it is 4"),
        ({"batch_size": 12, "segments_at_once": 4}, 2, "segments_at_once must divide the 6 segments .*, but it is 4"),
    ],
)
def test_a_batch_that_can_not_be_shared_out_is_refused(windows: dict[str, int], world: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        WindowsConfig(**windows).at_once(world)
