"""The memory estimate of a step of instruction tuning against the peak of real steps."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from measured_steps import SMALL, make_model, measured_peak, setting_of, thinned

from benchmarks.presets import Preset
from gakernels import GeneratorConfig
from gakernels.cost.memory import (
    Recomputation,
    choose_recomputation,
    estimate_memory,
    largest_step,
    recomputable_layers,
    set_recomputation,
)
from gakernels.cost.shapes import SHAPES, ModelShape
from gakernels.cost.step_memory import ConversationShape, StepShape
from gakernels.data.chat import EncodedConversation
from gakernels.training.instruction.answers import instruction_losses
from gakernels.training.instruction.batches import InstructionBatch, instruction_batch

TWO = {"rows": 2, "chunks": 3, "said": 2, "tokens": 40}


def drawn_batch(
    preset: Preset, rows: int, chunks: int, said: int, tokens: int, window: int | None = None, **losses: Any
) -> InstructionBatch:
    """Contexts of whole chunks, each with conversations of up to so many tokens."""

    def ids(count: int) -> Any:
        return torch.randint(3, preset.vocabulary, (count,)).numpy().astype(np.int32)

    contexts = [ids(chunks * preset.window).tolist() for _ in range(rows)]
    lengths = [tokens - 3 * number for number in range(said)]
    conversations = [[EncodedConversation(ids(n), np.arange(n) >= n // 2) for n in lengths] for _ in range(rows)]
    return instruction_batch(contexts, conversations, preset.window, window, **losses)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "small": ({}, {}, {"rows": 2, "chunks": 4, "said": 2, "tokens": 40}),
    "one chunk": ({}, {}, {"rows": 4, "chunks": 1, "said": 3, "tokens": 40}),
    "long conversations": ({}, {}, {"rows": 1, "chunks": 2, "said": 4, "tokens": 250}),
    "packed": ({}, {}, {"rows": 2, "chunks": 3, "said": 8, "tokens": 40, "window": 256}),
    "states": ({"state_size": 256, "rank": 64, "window": 16, "vocabulary": 256}, {}, {**TWO, "chunks": 4}),
    "two linears": ({}, {"linears": ("o_proj", "down_proj")}, TWO),
    "some layers": ({}, {"linears": ("down_proj",), "layers": (1, 2)}, TWO),
    "static": ({}, {"static_rank": 8}, {**TWO, "chunks": 1}),
    "reconstruction": ({}, {}, {**TWO, "repeated": [1, 2]}),
    "all losses": ({}, {}, {**TWO, "repeated": [1, 2], "completion": True}),
}


@pytest.mark.parametrize(
    ("name", "recompute", "dtype"),
    thinned(CASES, ("nothing", "gated", "whole"), (torch.float32, torch.bfloat16), every=3),
)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(name: str, recompute: str, dtype: torch.dtype) -> None:
    change, settings, sizes = CASES[name]
    preset = replace(SMALL, dtype=dtype, **change)
    model, shape = make_model(preset, **settings), ModelShape.from_config(preset.config())
    layers = tuple(recomputable_layers(shape, model.config))
    recomputed = {"nothing": Recomputation(), "gated": Recomputation(layers), "whole": Recomputation((), layers)}
    set_recomputation(model, recomputed[recompute])
    batch = drawn_batch(preset, **sizes)
    assert (batch.positions is not None) == ("window" in sizes)
    estimate = estimate_memory(shape, model.config, batch.shape, setting_of(preset), recomputed[recompute])
    measured = measured_peak(model, preset, lambda: instruction_losses(model, batch))
    assert abs(estimate.total - measured) <= 0.1 * measured, (estimate.total / measured, estimate)


MISTRAL, PAPER = SHAPES["mistral-7b"], GeneratorConfig()
LONG = StepShape(2, 1024, 8, tuple(range(8)), 0, ConversationShape(4, 256, 200, packed=False))
TALK = StepShape(8, 128, 1, (0,), 0, ConversationShape(64, 768, 20000, packed=True))


def test_a_budget_holds_for_every_kind_of_batch() -> None:
    for budget in (int(120e9), int(80e9), int(55e9)):
        chosen = choose_recomputation(MISTRAL, PAPER, [LONG, TALK], budget)
        estimates = [estimate_memory(MISTRAL, PAPER, step, recomputed=chosen.recomputed) for step in (LONG, TALK)]
        assert chosen.total == max(estimate.total for estimate in estimates) <= budget
        alone = [choose_recomputation(MISTRAL, PAPER, step, budget).recomputed for step in (LONG, TALK)]
        assert chosen.recomputed in alone
    assert largest_step(MISTRAL, PAPER, [TALK, LONG, TALK]) in (LONG, TALK)


def test_a_mask_costs_what_every_layer_keeps_of_it() -> None:
    packed = replace(TALK, conversations=replace(TALK.conversations, packed=True))
    plain = replace(TALK, conversations=replace(TALK.conversations, packed=False))
    kept = [estimate_memory(MISTRAL, PAPER, step).parts["kept by the base model"] for step in (packed, plain)]
    mask, keys = 64 * 768 * 768, 64 * 768 * 2 * (4096 - 1024)
    assert kept[0] - kept[1] == 31 * 2 * (mask + keys)  # the first layer keeps nothing of its attention
