"""The memory estimate against the peak of real steps, and recomputation by a budget."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from measured_steps import SMALL, make_model, measured_peak, setting_of, thinned
from torch import Generator

from benchmarks.measure import resident_bytes
from benchmarks.presets import Preset
from gakernels import GenerativeAdapter, GeneratorConfig
from gakernels.cost.memory import (
    Recomputation,
    StepSetting,
    StepShape,
    choose_recomputation,
    estimate_memory,
    fit_memory_budget,
    parse_bytes,
    recomputable_layers,
    set_recomputation,
)
from gakernels.cost.shapes import SHAPES, ModelShape
from gakernels.errors import InputError
from gakernels.model.attachment import decoder_layers
from gakernels.model.window_losses import Loss, pretraining_windows, window_losses
from gakernels.nn import GatedMLP
from gakernels.nn.recomputed_forward import RecomputedForward

MISTRAL, PAPER = SHAPES["mistral-7b"], GeneratorConfig()
SEGMENT = StepShape.pretraining(1, 1024, 8)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "small": ({}, {}, 2),
    "bf16": ({"dtype": torch.bfloat16}, {}, 2),
    "wide": ({"ffn": 2816, "vocabulary": 256, "state_size": 32, "dtype": torch.bfloat16}, {}, 1),
    "states": ({"state_size": 256, "rank": 64, "window": 16, "vocabulary": 256}, {}, 1),
    "one chunk": ({"chunks": 1, "window": 128}, {}, 2),
    "two linears": ({}, {"linears": ("o_proj", "down_proj")}, 1),
    "inputs": ({"dtype": torch.bfloat16}, {"linears": ("q_proj", "gate_proj")}, 1),
    "some layers": ({}, {"linears": ("down_proj",), "layers": (1, 2)}, 1),
    "static": ({}, {"static_rank": 8}, 1),
    "token weights": ({}, {"token_weights": True}, 1),
    "delta rule": ({}, {"delta_rule": True}, 1),
    "delta rule, bf16": ({"state_size": 256, "rank": 64, "dtype": torch.bfloat16}, {"delta_rule": True}, 2),
    "frobenius": ({}, {"norm": "frobenius", "state_size": 64, "rank": 8}, 1),
}


@pytest.mark.parametrize(("name", "recompute"), thinned(CASES, ("nothing", "gated", "whole", "both"), every=2))
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(generator: Generator, name: str, recompute: str) -> None:
    change, settings, rows = CASES[name]
    preset = replace(SMALL, **change)
    model = make_model(preset, **settings)
    shape = ModelShape.from_config(preset.config())
    layers = tuple(recomputable_layers(shape, model.config))
    parts = {"nothing": ((), ()), "gated": (layers, ()), "whole": ((), layers), "both": (layers[1:], layers[:1])}
    recomputed = Recomputation(*parts[recompute])
    set_recomputation(model, recomputed)
    step = StepShape.pretraining(rows, preset.window, preset.chunks)
    estimate = estimate_memory(shape, model.config, step, setting_of(preset), recomputed)
    measured = measured_peak(model, preset, pretraining_losses(model, preset, rows, generator))
    assert abs(estimate.total - measured) <= 0.1 * measured, (estimate.total / measured, estimate)


def pretraining_losses(
    model: GenerativeAdapter, preset: Preset, rows: int, generator: Generator
) -> Callable[[], Mapping[str, Loss]]:
    segments = torch.randint(3, preset.vocabulary, (rows, preset.segment_tokens), generator=generator)
    return lambda: window_losses(model, pretraining_windows(segments, preset.chunks, generator))


def test_without_the_parts_that_stay_it_is_still_close(generator: Generator) -> None:
    """Weights and optimizer are easily counted; what one step adds to them is the estimate proper."""
    model = make_model(SMALL)
    shape = ModelShape.from_config(SMALL.config())
    estimate = estimate_memory(shape, model.config, StepShape.pretraining(2, 64, 4), setting_of(SMALL))
    stays = sum(estimate.parts[name] for name in ("weights of the base model", "generators", "state of AdamW"))
    measured = measured_peak(model, SMALL, pretraining_losses(model, SMALL, 2, generator))
    resident = resident_bytes([*model.parameters(), *model.buffers()])
    resident += 2 * resident_bytes(list(model.generators.parameters()))
    assert abs(stays - resident) <= 0.01 * resident
    assert abs((estimate.total - stays) - (measured - resident)) <= 0.1 * (measured - resident)


def test_the_paper_s_step_fits_the_gpus() -> None:
    assert estimate_memory(MISTRAL, PAPER, SEGMENT).total < 141e9
    assert choose_recomputation(MISTRAL, PAPER, SEGMENT, int(141e9)).recomputed == Recomputation()
    all_again = estimate_memory(MISTRAL, PAPER, SEGMENT, recomputed=Recomputation(tuple(range(32))))
    assert all_again.total < 75e9  # an 80 GB GPU, with room for its context and the allocator's gaps
    small = choose_recomputation(MISTRAL, PAPER, SEGMENT, int(75e9))
    assert small.total <= 75e9
    assert 0 < len(small.recomputed.gated) < 32


def test_as_few_layers_as_the_budget_needs() -> None:
    chosen = choose_recomputation(MISTRAL, PAPER, SEGMENT, int(70e9))
    count = len(chosen.recomputed.gated)
    assert chosen.recomputed == Recomputation(tuple(range(count)))
    fewer = estimate_memory(MISTRAL, PAPER, SEGMENT, recomputed=Recomputation(tuple(range(count - 1))))
    assert chosen.total <= 70e9 < fewer.total


def test_shards_and_small_weights_take_less() -> None:
    plain = estimate_memory(MISTRAL, PAPER, SEGMENT)
    sharded = estimate_memory(MISTRAL, PAPER, SEGMENT, StepSetting(shards=8))
    for name in ("weights of the base model", "generators", "state of AdamW"):
        assert plain.parts[name] / 8 <= sharded.parts[name] < plain.parts[name] / 4
    quantised = estimate_memory(MISTRAL, PAPER, SEGMENT, StepSetting(linear_bytes=0.5))
    in_layers = 32 * sum(linear.weights for linear in MISTRAL.linears)
    assert plain.total - quantised.total == pytest.approx(1.5 * in_layers)
    assert estimate_memory(MISTRAL, PAPER, SEGMENT, StepSetting(accumulates=True)).total > plain.total


def test_only_layers_behind_the_first_adapter_are_recomputed() -> None:
    def layers(*linears: str, numbers: tuple[int, ...] | None = None) -> list[int]:
        return recomputable_layers(MISTRAL, GeneratorConfig(linears=linears, layers=numbers))

    assert layers("o_proj") == layers("gate_proj") == list(range(32))
    assert layers("down_proj") == list(range(1, 32))
    assert layers("o_proj", numbers=(30,)) == [30, 31]
    with pytest.raises(InputError, match="recomputed must name layers out of"):
        estimate_memory(MISTRAL, GeneratorConfig(layers=(30,)), SEGMENT, recomputed=Recomputation(whole=(3,)))


def test_a_budget_sets_the_model() -> None:
    preset = replace(SMALL, ffn=2816)  # gate and up are worth more than the rest of a layer
    model, shape = make_model(preset), ModelShape.from_config(preset.config())
    step, setting = StepShape.pretraining(1, 64, 4), setting_of(preset)
    layers = decoder_layers(model.base)[1]

    def fit(budget: int) -> Recomputation:
        recomputed = fit_memory_budget(model, step, budget, setting).recomputed
        whole = [isinstance(vars(layer).get("forward"), RecomputedForward) for layer in layers]
        assert [part.recompute for part in gated(model)] == [number in recomputed.gated for number in range(3)]
        assert whole == [number in recomputed.whole for number in range(3)]
        return recomputed

    choices = [Recomputation(gated=tuple(range(count))) for count in range(4)]
    full, *less = (estimate_memory(shape, model.config, step, setting, choice).total for choice in choices)
    assert fit(full - 1) == Recomputation(gated=(0,))
    assert fit(min(less) - 1).whole
    assert fit(full) == Recomputation()
    with pytest.raises(InputError, match=r"memory_budget must be at least \d+ MB, .* but it is 1 MB;"):
        fit(10**6)


def test_a_layer_without_the_usual_part_is_refused() -> None:
    model = make_model(SMALL)
    layer: Any = model.base.get_decoder().layers[1]
    layer.mlp = layer.mlp.original
    with pytest.raises(InputError, match="gated feed-forward part"):
        set_recomputation(model, Recomputation((0, 1)))
    assert not any(part.recompute for part in gated(model))


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("1.5 GiB", 3 * 2**29), ("512mb", 512 * 10**6), (12345, 12345), ("7B", 7)]
)
def test_amounts_of_memory(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "80 gigs", "-1GB", "0", "GB", "1e9"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(InputError, match="memory budget"):
        parse_bytes(text)


def gated(model: GenerativeAdapter) -> list[GatedMLP]:
    return [module for module in model.base.modules() if isinstance(module, GatedMLP)]


def test_two_adapted_linears_a_layer_fit_an_80_gb_gpu_if_layers_are_recomputed_as_a_whole() -> None:
    config = GeneratorConfig(linears=("o_proj", "down_proj"))
    chosen = choose_recomputation(MISTRAL, config, SEGMENT, int(75e9))
    assert chosen.total <= 75e9
    assert chosen.recomputed.whole
    assert not chosen.recomputed.gated  # an operation saves more bytes so
    one = choose_recomputation(MISTRAL, PAPER, SEGMENT, int(45e9))
    assert one.recomputed.whole + one.recomputed.gated == tuple(range(32))
    assert one.recomputed.gated
