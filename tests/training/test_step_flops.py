"""Operations of a training step against those that PyTorch counts while it runs."""

from typing import Any

import pytest
import torch
from evaluation.counted import MAPPING, by_values
from tiny import SIZES, VOCABULARY, make_model, random_ids
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gakernels.cost import flops
from gakernels.cost.shapes import ModelShape
from gakernels.cost.step_flops import pretraining_flops
from gakernels.model.window_losses import pretraining_windows
from gakernels.ops.delta_state import eager as delta_state
from gakernels.ops.low_rank_polar import eager as low_rank_polar

LENGTH = 6


def state_products(hidden: Tensor, a2: Tensor, *_: Any) -> int:
    tokens, (size, width) = hidden.numel() // hidden.shape[-1], a2.shape
    return tokens * (4 * width * size + 2 * size * size)


def delta_products(*arguments: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        delta_state.forward(*(one.detach() if isinstance(one, Tensor) else one for one in arguments[:6]))
    return counter.get_total_flops()


def linear_products(x: Tensor, weight: Tensor, a: Tensor, *_: Any) -> int:
    return 2 * x.numel() * weight.shape[0] + 2 * x.numel() // x.shape[-1] * a.shape[1] * sum(weight.shape)


def polar_products(states: Tensor, sketch: Tensor, power_iterations: int, damping: float, *_: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        low_rank_polar.forward(states.detach(), sketch, power_iterations, damping)
    return counter.get_total_flops()


# Forward passes are operators, which hide their products; backward passes are plain PyTorch.
OPERATORS = {
    torch.ops.gakernels.context_state: by_values(state_products),
    torch.ops.gakernels.delta_state: by_values(delta_products),
    torch.ops.gakernels.lowrank_linear: by_values(linear_products),
    torch.ops.gakernels.low_rank_polar: by_values(polar_products),
}


@pytest.mark.parametrize(("chunks", "slices"), [(1, 1), (2, 1), (4, 1), (3, 2), (3, 0)])
@pytest.mark.parametrize(
    "settings",
    [
        {"linears": ("o_proj",)},
        {"linears": ("o_proj", "down_proj"), "layers": (1, 2)},
        {"linears": ("q_proj", "o_proj"), "static_rank": 3},
        {"linears": ("down_proj",), "norm": "frobenius"},
        {"linears": ("o_proj",), "token_weights": True},
        {"linears": ("o_proj", "down_proj"), "delta_rule": True},
    ],
)
def test_they_are_those_that_run(settings: dict[str, Any], chunks: int, slices: int) -> None:
    model = make_model(**settings, chunk_size=LENGTH)
    batch = pretraining_windows(random_ids(1, chunks * LENGTH), chunks, torch.Generator(), slices=slices)
    with FlopCounterMode(display=False, custom_mapping=MAPPING | OPERATORS) as forward:
        hidden, _ = model(batch.input_ids, batch.mask, chunks, batch.seen)
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as backward:
        hidden.backward(torch.randn_like(hidden))
    shape = ModelShape.from_config(model.base.config)
    count = pretraining_flops(shape, model.config, chunks, LENGTH, slices=slices)
    predicted = sum(int(target[..., 1:].sum()) for target in batch.targets.values())
    assert count.forward.head == count.backward.head == 2 * SIZES["hidden_size"] * VOCABULARY * predicted
    assert forward.get_total_flops() == count.forward.total - count.forward.head
    share = 0 if model.config.norm == "frobenius" else 0.03  # what the backward of the norm is counted too high by
    ran, counted = backward.get_total_flops(), count.backward.total - count.backward.head
    assert (1 - share) * counted <= ran <= counted
    assert count.total == count.forward.total + count.backward.total
    assert (count * 3).total == 3 * count.total
    more = pretraining_flops(shape, model.config, chunks, LENGTH, plain=True, slices=slices)
    assert more.total - count.total == 2 * 2 * SIZES["hidden_size"] * VOCABULARY * (LENGTH - 1)


@pytest.mark.parametrize("tokens", [2, 32, 33, 70, 200])
def test_products_of_the_delta_rule(tokens: int) -> None:
    hidden, strength = torch.randn(1, 1, tokens, 5), torch.rand(1, 1, tokens)
    a2, b1 = torch.randn(7, 5), torch.randn(5, 7)
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as forward:
        states, projected = delta_state.forward(hidden, a2, b1, strength, None, None)
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as backward:
        delta_state.backward(states, hidden, a2, b1, strength, None, None, states, projected, (True, True, True))
    projections = 4 * tokens * 5 * 7
    assert forward.get_total_flops() == projections + flops.delta_products(7, tokens, 2, 2)
    assert backward.get_total_flops() == 2 * projections + flops.delta_products(7, tokens, 5, 5)
