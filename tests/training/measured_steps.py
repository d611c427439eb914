"""The peak memory of a real step, for tests of its estimate."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.measure import peak_bytes, resident_bytes
from benchmarks.presets import PRESETS, Preset, make_base
from gakernels import GenerativeAdapter, GeneratorConfig
from gakernels.cost.memory import StepSetting
from gakernels.model.window_losses import Loss

CPU = torch.device("cpu")
SMALL = replace(
    PRESETS["cpu-mid"], hidden=256, ffn=704, heads=4, kv_heads=2, state_size=128, rank=16, window=64, chunks=4, layers=3
)


def thinned(cases: Iterable[object], *others: Sequence[object], every: int) -> list[Any]:
    """All combinations; every n-th one, spread over the cases, runs in `make test`, the others are slow tests."""
    return [
        pytest.param(case, *rest, marks=() if (row + column) % every == 0 else pytest.mark.slow)
        for row, case in enumerate(cases)
        for column, rest in enumerate(product(*others))
    ]


def make_model(preset: Preset, **settings: Any) -> GenerativeAdapter:
    config = GeneratorConfig(
        **{"state_size": preset.state_size, "rank": preset.rank, "chunk_size": preset.window, **settings}
    )
    model = GenerativeAdapter(make_base(preset, CPU, 0), config)
    for name in model.adapted_names:
        nn.init.normal_(model.generator(name).output_map, std=0.02)
    return model


def setting_of(preset: Preset) -> StepSetting:
    return StepSetting(preset.dtype, autocast=preset.dtype != torch.float32, device="cpu")


def measured_peak(model: GenerativeAdapter, preset: Preset, losses_of: Callable[[], Mapping[str, Loss]]) -> int:
    """The base, the generators, the optimizer's state, and what one step allocates beside them."""
    parameters = list(model.generators.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    mixed = preset.dtype != torch.float32

    def step() -> None:
        with torch.autocast("cpu", preset.dtype if mixed else None, enabled=mixed):
            total = torch.stack([loss.mean for loss in losses_of().values()]).sum()
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    transient = peak_bytes(step, CPU)
    states = [value for state in optimizer.state.values() for value in state.values()]
    return transient + resident_bytes([*model.parameters(), *model.buffers(), *states])
