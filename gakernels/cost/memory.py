"""The memory of a training step, estimated from shapes, and how to stay within a budget (docs/training.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

from torch import nn

from gakernels.cost import flops
from gakernels.cost.pass_memory import GATED, NOTHING, ModelSizes, PassMemory, Recomputation, StepSetting
from gakernels.cost.shapes import ModelShape
from gakernels.cost.step_memory import StepMemory, StepShape
from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter
from gakernels.model.attachment import decoder_layers
from gakernels.model.config import GeneratorConfig
from gakernels.nn import GatedMLP
from gakernels.nn.recomputed_forward import RecomputedForward

__all__ = [
    "MemoryEstimate",
    "Recomputation",
    "StepSetting",
    "StepShape",
    "choose_recomputation",
    "estimate_memory",
    "fit_memory_budget",
    "largest_step",
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
        recomputed: what is recomputed in the backward.
    """

    parts: Mapping[str, int]
    moment: str
    recomputed: Recomputation = NOTHING

    @property
    def total(self) -> int:
        """The total number of bytes."""
        return sum(self.parts.values())


def estimate_memory(
    shape: ModelShape,
    config: GeneratorConfig,
    step: StepShape,
    setting: StepSetting | None = None,
    recomputed: Recomputation = NOTHING,
) -> MemoryEstimate:
    """The peak memory of one process in a training step.

    The decoder layers are assumed to be Llama-like, with `GatedMLP` and `FrozenRMSNorm`; others keep more.

    Args:
        shape: shape of the base model.
        config: settings of the generators.
        step: what goes through the model at once.
        setting: how the step is run; by default bfloat16 with float32 generators under autocast, on one GPU.
        recomputed: layers out of `recomputable_layers`; by default none.

    Raises:
        InputError: a layer has nothing to recompute, or config names layers that do not exist.
    """
    layers = recomputable_layers(shape, config)
    for number in (*recomputed.gated, *recomputed.whole):
        if number not in layers:
            raise InputError(f"recomputed must name layers out of {list(layers)}, but names {number}")
    count = StepMemory(shape, config, setting or StepSetting(), step, recomputed)
    moment, parts = max(count.moments(), key=lambda item: sum(item[1].values()))
    return MemoryEstimate(parts, moment, recomputed)


def recomputable_layers(shape: ModelShape, config: GeneratorConfig) -> list[int]:
    """The decoder layers that keep gate and up for the backward: those after the first adapter."""
    sizes = ModelSizes(shape, config, StepSetting())
    return [layer for layer in range(shape.layers) if sizes.keeps_gated(layer)]


def largest_step(
    shape: ModelShape,
    config: GeneratorConfig,
    steps: Sequence[StepShape],
    setting: StepSetting | None = None,
    recomputed: Recomputation = NOTHING,
) -> StepShape:
    """The step that takes the most memory; see `estimate_memory`."""
    if len(steps) == 1:
        return steps[0]
    return max(steps, key=lambda step: estimate_memory(shape, config, step, setting, recomputed).total)


def choose_recomputation(
    shape: ModelShape,
    config: GeneratorConfig,
    steps: StepShape | Sequence[StepShape],
    budget: int,
    setting: StepSetting | None = None,
) -> MemoryEstimate:
    """Choose as few decoder layers as must recompute gate and up, or everything, for steps to fit a budget of bytes.

    Whichever of the two saves more bytes for an operation comes first. The first layers are chosen: their backward
    comes last, when the memory that the others kept is free again.

    Returns:
        The estimate of the step that then takes the most.

    Raises:
        InputError: a step does not fit even if all layers keep only their input.
    """
    steps = [steps] if isinstance(steps, StepShape) else steps
    step, least = largest_step(shape, config, steps, setting), math.inf
    plain = StepMemory(shape, config, setting or StepSetting(), step)
    for recomputed in _choices(plain.conversations or plain.contexts, tuple(recomputable_layers(shape, config))):
        estimate = estimate_memory(shape, config, step, setting, recomputed)
        if estimate.total <= budget:
            step = largest_step(shape, config, steps, setting, recomputed)
            estimate = estimate_memory(shape, config, step, setting, recomputed)
        if estimate.total <= budget:
            return estimate
        least = min(least, estimate.total)
    raise InputError(
        f"memory_budget must be at least {math.ceil(least / 1e6)} MB, what a step needs if all layers "
        f"are recomputed, but it is {budget / 1e6:g} MB; fewer rows or shorter windows need less"
    )


def _choices(plain: PassMemory, layers: tuple[int, ...]) -> Iterator[Recomputation]:
    """What may be recomputed, from nothing to all of these layers."""
    counts = range(1, len(layers) + 1)
    gate_and_up = 2 * sum(linear.weights for linear in plain.shape.stages[GATED])
    tokens = plain.windows.window_tokens
    everything = flops.decoder(plain.shape, tokens).total / (plain.shape.layers * tokens)  # of a token in a layer
    last = (plain.shape.layers - 1,)
    yield NOTHING
    if _saved(plain, Recomputation(gated=last)) / gate_and_up > _saved(plain, Recomputation(whole=last)) / everything:
        yield from (Recomputation(gated=layers[:count]) for count in counts)
        yield from (Recomputation(layers[count:], layers[:count]) for count in counts)
    else:
        yield from (Recomputation(whole=layers[:count]) for count in counts)


def _saved(plain: PassMemory, recomputed: Recomputation) -> int:
    """The bytes that the last layer then does not keep."""
    last = plain.shape.layers - 1
    return plain.kept(last) - replace(plain, recomputed=recomputed).kept(last)


def fit_memory_budget(
    model: GenerativeAdapter,
    steps: StepShape | Sequence[StepShape],
    budget: int,
    setting: StepSetting | None = None,
) -> MemoryEstimate:
    """Make the layers of a model recompute what `choose_recomputation` chooses.

    Raises:
        InputError: a step does not fit, or see `set_recomputation`.
    """
    shape = ModelShape.from_config(model.base.config)
    estimate = choose_recomputation(shape, model.config, steps, budget, setting)
    set_recomputation(model, estimate.recomputed)
    return estimate


def set_recomputation(model: GenerativeAdapter, recomputed: Recomputation) -> None:
    """Make exactly these decoder layers recompute gate and up, or everything, in the backward.

    Results are bitwise the same.

    Raises:
        InputError: a layer of `gated` has no `GatedMLP`, or one of `whole` is compiled; then nothing has been changed.
    """
    layers = decoder_layers(model.base)[1]
    gated = [[part for part in layer.children() if isinstance(part, GatedMLP)] for layer in layers]
    for number in recomputed.gated:
        if not 0 <= number < len(layers) or not gated[number]:
            raise InputError(
                f"gated must name decoder layers with a gated feed-forward part of the usual kind, but names {number}"
            )
    for number in recomputed.whole:
        if not 0 <= number < len(layers) or not isinstance(_forward(layers[number]), RecomputedForward | NoneType):
            raise InputError(f"whole must name decoder layers that are not compiled, but names {number}")
    for number, layer in enumerate(layers):
        for part in gated[number]:
            part.recompute = number in recomputed.gated
        if number in recomputed.whole:
            layer.forward = RecomputedForward(layer)
        elif isinstance(_forward(layer), RecomputedForward):
            del layer.forward


def _forward(layer: nn.Module) -> Any:
    """A forward of the layer's own, if there is one instead of that of its class."""
    return vars(layer).get("forward")


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
