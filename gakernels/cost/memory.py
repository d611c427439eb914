"""The memory of a training step, estimated from shapes, and how to stay within a budget (docs/training.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gakernels.cost.shapes import ModelShape
from gakernels.cost.step_memory import StepMemory, StepSetting, StepShape
from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter
from gakernels.model.attachment import decoder_layers
from gakernels.model.config import GeneratorConfig
from gakernels.nn import GatedMLP

__all__ = [
    "MemoryEstimate",
    "StepSetting",
    "StepShape",
    "choose_recomputation",
    "estimate_memory",
    "fit_memory_budget",
    "parse_bytes",
    "recomputable_layers",
    "set_recomputation",
]

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes in use at the peak of a training step.

    Attributes:
        parts: bytes by name; they add up to `total`.
        moment: the moment of the peak.
        recomputed_layers: indices of the decoder layers that recompute gate and up in the backward.
    """

    parts: Mapping[str, int]
    moment: str
    recomputed_layers: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """The total number of bytes."""
        return sum(self.parts.values())


def estimate_memory(
    shape: ModelShape,
    config: GeneratorConfig,
    step: StepShape,
    setting: StepSetting | None = None,
    recomputed_layers: Sequence[int] = (),
) -> MemoryEstimate:
    """The peak memory of one process in a training step.

    The decoder layers are assumed to be Llama-like, with `GatedMLP` and `FrozenRMSNorm`; others keep more.

    Args:
        shape: shape of the base model.
        config: settings of the generators.
        step: what goes through the model at once.
        setting: how the step is run; by default bfloat16 with float32 generators under autocast, on one GPU.
        recomputed_layers: layers that recompute gate and up, a subset of `recomputable_layers`.

    Raises:
        InputError: a decoder layer has no gate and up to recompute, or config names layers that do not exist.
    """
    layers = recomputable_layers(shape, config)
    for number in recomputed_layers:
        if number not in layers:
            raise InputError(f"recomputed_layers must be out of {list(layers)}, but has {number}")
    count = StepMemory(shape, config, step, setting or StepSetting(), frozenset(recomputed_layers))
    moment, parts = max(count.moments(), key=lambda item: sum(item[1].values()))
    return MemoryEstimate(parts, moment, tuple(sorted(recomputed_layers)))


def recomputable_layers(shape: ModelShape, config: GeneratorConfig) -> list[int]:
    """The decoder layers that keep gate and up for the backward: those after the first adapter."""
    count = StepMemory(shape, config, StepShape.pretraining(1, 2, 1), StepSetting())
    return [layer for layer in range(shape.layers) if count.keeps_gated(layer)]


def choose_recomputation(
    shape: ModelShape, config: GeneratorConfig, step: StepShape, budget: int, setting: StepSetting | None = None
) -> MemoryEstimate:
    """Choose the fewest decoder layers that must recompute gate and up for a step to fit a budget of bytes.

    The first layers are chosen: their backward comes last, when the memory that the others kept is free again.

    Raises:
        InputError: the step does not fit even with all of them.
    """
    layers, least = recomputable_layers(shape, config), math.inf
    for count in range(len(layers) + 1):
        estimate = estimate_memory(shape, config, step, setting, layers[:count])
        if estimate.total <= budget:
            return estimate
        least = min(least, estimate.total)
    raise InputError(
        f"memory_budget must be at least {math.ceil(least / 1e6)} MB, what a step needs if all layers "
        f"recompute gate and up, but it is {budget / 1e6:g} MB; fewer rows or shorter windows need less"
    )


def fit_memory_budget(
    model: GenerativeAdapter, step: StepShape, budget: int, setting: StepSetting | None = None
) -> MemoryEstimate:
    """Make a model recompute gate and up in the layers that `choose_recomputation` chooses.

    Raises:
        InputError: the step does not fit, or such a layer has no `GatedMLP`.
    """
    shape = ModelShape.from_config(model.base.config)
    estimate = choose_recomputation(shape, model.config, step, budget, setting)
    set_recomputation(model, estimate.recomputed_layers)
    return estimate


def set_recomputation(model: GenerativeAdapter, layers: Sequence[int]) -> None:
    """Make exactly these decoder layers recompute gate and up in the backward; results are bitwise the same.

    Raises:
        InputError: one of them has no `GatedMLP`; then nothing has been changed.
    """
    parts = [
        [part for part in layer.children() if isinstance(part, GatedMLP)] for layer in decoder_layers(model.base)[1]
    ]
    for number in layers:
        if not 0 <= number < len(parts) or not parts[number]:
            raise InputError(
                f"layers must be decoder layers with a gated feed-forward part of the usual kind, but has {number}"
            )
    for number, found in enumerate(parts):
        for part in found:
            part.recompute = number in layers


def parse_bytes(text: str | int) -> int:
    """The number of bytes of an amount such as `80GB` (10^9), `80GiB` (2^30), `512MB`, or a plain number.

    Raises:
        InputError: it is not such an amount, or is zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]I?)?B)?\s*", str(text).upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise InputError(f"a memory budget must be an amount (80GB, 512MiB) or a number of bytes, but it is {text!r}")
    return size
