"""Plans against models that are really made, and their own arithmetic."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_base, make_config
from transformers import AutoModelForCausalLM

from gakernels import GenerativeAdapter, GeneratorConfig, InputError
from gakernels.cost.memory import Recomputation
from gakernels.training.base_model import BaseConfig, LlamaSizes
from gakernels.training.plan import plan_pretraining
from gakernels.training.pretraining_data import DataConfig
from gakernels.training.pretraining_recipe import PretrainingRecipe, WindowsConfig
from gakernels.training.recipes import load_recipe
from gakernels.training.run_memory import step_setting
from gakernels.training.trainer import TrainerConfig


def make_recipe(model: BaseConfig, generator: GeneratorConfig | None = None, **changes: Any) -> PretrainingRecipe:
    return PretrainingRecipe(
        model=model,
        data=DataConfig("nowhere"),
        trainer=TrainerConfig(**changes.pop("trainer", {"steps": 6})),
        generator=generator or make_config(),
        **changes,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model of which only the configuration is there."""
    make_base().config.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"linears": ("q_proj", "up_proj"), "layers": (0, 2)},
        {"static_rank": 3},
        {"token_weights": True},
        {"delta_rule": True},
        {"norm": "frobenius"},
    ],
)
def test_parameters_are_those_of_the_model(folder: Path, settings: dict[str, Any]) -> None:
    config = make_config(**settings)
    plan = plan_pretraining(make_recipe(BaseConfig(str(folder)), config), device="cpu")
    model = GenerativeAdapter(make_base(), config)
    assert plan.base_parameters == sum(parameter.numel() for parameter in model.base.parameters())
    assert plan.generator_parameters == sum(parameter.numel() for parameter in model.generators.parameters())


def test_steps_tokens_and_time_follow_from_each_other(folder: Path) -> None:
    windows = WindowsConfig(chunks=3, batch_size=8, segments_at_once=2)
    plan = plan_pretraining(make_recipe(BaseConfig(str(folder)), windows=windows), processes=2, device="cpu")
    assert (plan.processes, plan.segments, plan.segments_at_once, plan.segment_tokens) == (2, 8, 2, 18)
    assert plan.tokens == 6 * 8 * 18
    tflops = 1e-6
    assert plan.seconds(tflops) == pytest.approx(6 * plan.flops.total / (tflops * 1e12) / 2)
    assert plan.tokens_per_second(tflops) * plan.seconds(tflops) == pytest.approx(plan.tokens)
    one = plan_pretraining(make_recipe(BaseConfig(str(folder)), windows=replace(windows, batch_size=2)), device="cpu")
    assert plan.flops.total == 4 * one.flops.total


def test_memory_is_that_of_a_micro_batch_and_of_how_the_step_is_run(folder: Path) -> None:
    windows = WindowsConfig(chunks=3, batch_size=8, segments_at_once=2)
    recipe = make_recipe(BaseConfig(str(folder)), windows=windows)
    assert recipe.micro_batches(2).accumulates
    assert not recipe.micro_batches(4).accumulates
    setting = step_setting(recipe, torch.float32, True, 2, "cpu")
    assert setting.accumulates
    assert not setting.autocast
    assert setting.dtype == torch.float32
    assert (setting.shards, setting.linear_bytes) == (1, None)
    less = replace(recipe, windows=replace(windows, segments_at_once=1))
    assert plan_pretraining(less, 2, "cpu").memory.total < plan_pretraining(recipe, 2, "cpu").memory.total
    mixed = replace(recipe, model=BaseConfig("x", dtype="bfloat16", quantization="nf4"), parallel="shards")
    mixed = replace(mixed, trainer=TrainerConfig(1, precision="bfloat16"))
    setting = step_setting(mixed, torch.bfloat16, False, 4, "cuda")
    assert (setting.dtype, setting.shards, setting.linear_bytes) == (torch.bfloat16, 4, 0.5)
    assert setting.autocast


def test_a_budget_is_kept_or_refused(folder: Path) -> None:
    recipe = make_recipe(BaseConfig(str(folder)))
    free = plan_pretraining(recipe, device="cpu").memory
    assert free.recomputed == Recomputation()
    tight = plan_pretraining(replace(recipe, memory_budget=str(free.total - 1)), device="cpu").memory
    assert tight.recomputed != Recomputation()
    assert tight.total < free.total
    with pytest.raises(InputError, match="memory_budget must be at least"):
        plan_pretraining(replace(recipe, memory_budget="1KB"), device="cpu")


def test_which_gpus_a_run_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(BaseConfig(str(folder)))
    assert set(plan_pretraining(recipe, device="cpu").fits.values()) == {Recomputation()}
    monkeypatch.setattr("gakernels.training.run_memory.RESERVED", 0)
    free = plan_pretraining(recipe, device="cuda").memory
    sizes = tuple(size / 1e9 for size in (free.total, free.total - 1, 1000))
    monkeypatch.setattr("gakernels.training.run_memory.GPU_GIGABYTES", sizes)
    enough, less, nothing = plan_pretraining(recipe, device="cpu").fits.values()
    assert (enough, nothing) == (Recomputation(), None)
    assert less not in (None, Recomputation())


def test_sizes_in_a_recipe_are_those_of_such_a_model() -> None:
    sizes = {"hidden": 32, "ffn": 48, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocabulary": 64}
    for family in ("llama", "llama_tied"):
        base = make_base(family)
        assert isinstance(base, type(AutoModelForCausalLM.from_config(base.config)))
        shape = LlamaSizes(**sizes, tied=family == "llama_tied").shape("x")
        assert shape.parameters == sum(parameter.numel() for parameter in base.parameters())
        recipe = make_recipe(BaseConfig("x", shape=LlamaSizes(**sizes, tied=family == "llama_tied")))
        assert plan_pretraining(recipe, device="cpu").base_parameters == shape.parameters


SIZES = "hidden: 576, ffn: 1536, layers: 30, heads: 9, kv_heads: 3, head_dim: 64, vocabulary: 49152, tied: true"


def test_sizes_may_be_given_in_one_override() -> None:
    recipe = load_recipe(PretrainingRecipe, Path("cpu-small-pretraining"), [f"model.shape={{{SIZES}}}"])
    assert recipe.model.shape == LlamaSizes(576, 1536, 30, 9, 3, 64, 49152, tied=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (f"{SIZES}, depth: 3", r"model\.shape\.depth is not a setting; known are hidden, ffn"),
        (SIZES.replace("576", "many"), r"model\.shape\.hidden must be an integer, but it is 'many'"),
        (SIZES.replace("30", "0"), r"model\.shape\.layers must be at least 1, but it is 0"),
        ("hidden: 576", r"model\.shape\.ffn is needed, but it is not given"),
    ],
)
def test_a_mistake_in_sizes_is_named(sizes: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        load_recipe(PretrainingRecipe, Path("cpu-small-pretraining"), [f"model.shape={{{sizes}}}"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int4"}, r"^dtype must be one of float32, bfloat16, float16, but it is 'int4'"),
        ({"quantization": "int2"}, r"^quantization must be one of fp8, .*, but it is 'int2'"),
        ({"shape": "mistral-8b"}, r"^shape must be one of .*mistral-7b, .*, but it is 'mistral-8b'"),
    ],
)
def test_a_base_that_can_not_be_is_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BaseConfig("x", **values)


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.name: the configuration of '.*nothing' can't be read"):
        plan_pretraining(make_recipe(BaseConfig(str(tmp_path / "nothing"))))


def test_processes_that_do_not_divide_the_batch_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="multiple of the number of processes, 3, but it is 8"):
        plan_pretraining(make_recipe(BaseConfig(str(folder))), processes=3)


@pytest.mark.parametrize("size", [6, 24])
def test_memory_is_that_of_the_larger_kind_of_step(folder: Path, size: int) -> None:
    generator = make_config(chunk_size=size)
    windows = WindowsConfig(chunks=4, batch_size=8, segments_at_once=2)
    alone = WindowsConfig(chunks=1, batch_size=32, segments_at_once=8)
    several, single, both = (
        plan_pretraining(make_recipe(BaseConfig(str(folder)), generator, windows=kind), device="cpu").memory
        for kind in (windows, alone, replace(windows, single_share=0.4))
    )
    assert several.total != single.total
    assert both.total == max(several.total, single.total)
