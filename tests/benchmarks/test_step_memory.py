"""What a training step will take at its peak, and that nothing is begun which can't fit."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import train_step
from benchmarks.presets import PRESETS, check_preset, estimated_bytes, generator_numbers, make_model, shape_of
from benchmarks.rows import UNAVAILABLE
from benchmarks.train_step import Contender, StepSettings

CPU = torch.device("cpu")
SMALL = replace(PRESETS["tiny"], window=128, hidden=128, ffn=256, state_size=64, vocabulary=2048, checkpointing=True)


@pytest.mark.parametrize("segments", [1, 3])
def test_the_eager_baseline_takes_about_what_is_foretold(segments: int) -> None:
    preset = replace(SMALL, segments=segments)
    (contender,) = train_step.measure(StepSettings(preset, ("reference",), CPU, steps=1))
    assert estimated_bytes("reference", preset, CPU) == pytest.approx(contender.runners[0].peak, rel=0.1)


def test_floors_take_no_more_than_is_foretold() -> None:
    names = ("dense_lora", "frozen_base")
    for contender in train_step.measure(StepSettings(SMALL, names, CPU, steps=1)):
        foretold = estimated_bytes(contender.name, SMALL, CPU)
        assert foretold is not None
        assert contender.runners[0].peak <= 1.03 * foretold  # an estimate within a few percent of the measured peak


def test_what_is_not_counted_is_not_foretold() -> None:
    assert estimated_bytes("compiled", SMALL, CPU) is None
    assert estimated_bytes("reference", replace(SMALL, checkpointing=False), CPU) is None


@pytest.mark.parametrize("name", ["mistral-7b", "qwen3-8b", "smollm2-135m"])
def test_the_parameters_are_counted(name: str) -> None:
    preset = check_preset(PRESETS[name])
    model = make_model(preset, CPU, seed=0)
    assert shape_of(preset).parameters == sum(p.numel() for p in model.base.parameters())
    assert generator_numbers(preset) == sum(p.numel() for p in model.generators.parameters())


def test_the_generators_are_counted() -> None:
    preset = replace(SMALL, linears=("o_proj", "down_proj"), adapted_layers=(1,), static_rank=3)
    model = make_model(preset, CPU, 0)
    assert generator_numbers(preset) == sum(p.numel() for p in model.generators.parameters())


@pytest.mark.parametrize(("free", "refused"), [(10**6, True), (10**12, False)])
def test_what_can_not_fit_is_left_out_before_anything_is_made(
    free: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10**12))
    monkeypatch.setattr(train_step, "provider_error", lambda *arguments: checked.append(arguments) or 0.0)
    contender = Contender("trainer")
    with train_step._guarded(contender):
        train_step._check(contender, StepSettings(SMALL, ("trainer",), torch.device("cuda")))
    assert (contender.status == UNAVAILABLE) == refused
    assert bool(checked) != refused
    if refused:
        assert contender.detail.startswith("a step takes about 0.0")
        assert "GB are free" in contender.detail


def test_an_80_gb_card_has_room_for_each_provider_of_the_plan() -> None:
    """One after the other: side by side they would not have."""
    cuda = torch.device("cuda")
    taken = [estimated_bytes(name, PRESETS["mistral-7b"], cuda) for name in ("trainer", "reference")]
    small = [estimated_bytes(name, PRESETS["smollm2-135m"], cuda) for name in ("trainer", "reference")]
    assert all(size is not None and size < 80e9 for size in (*taken, *small))
