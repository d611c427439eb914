"""What a provider's training step takes at its peak, from shapes: what can't fit is not started."""

import functools
from dataclasses import replace

import torch

from benchmarks.presets import Preset
from gakernels.cost.flops import adapted_layers, adapted_linears
from gakernels.cost.memory import StepSetting, StepShape, estimate_memory, recomputable_layers
from gakernels.cost.shapes import ModelShape
from gakernels.cost.step_memory import generator_parameters
from gakernels.training.plan import QUANTIZED_BYTES

# Whose memory is that of the library's estimate. The floors do less of the same.
ESTIMATED = ("auto", "trainer", "eager", "triton", "cuda", "overlap", "recompute")
BELOW = ("dense_lora", "frozen_base")


def estimated_bytes(name: str, preset: Preset, device: torch.device) -> int | None:
    """The peak of a provider's step; for the floors a bound; None where it isn't known.

    Compiled steps keep something else, and of the eager baseline only the form that recomputes its layers is counted.
    """
    if name in (*ESTIMATED, *BELOW):
        return _library_bytes(preset, device, recompute=name == "recompute")
    return _baseline_bytes(preset) if name == "reference" and preset.checkpointing else None


def _library_bytes(preset: Preset, device: torch.device, recompute: bool) -> int:
    """By the estimate of `gakernels.cost.memory`."""
    shape, config = shape_of(preset), preset.generator_config()
    tokens = preset.segments * preset.chunks * 2 * (preset.window - 1)  # all that can be predicted
    step = replace(StepShape.pretraining(preset.segments, preset.window, preset.chunks), predicted=tokens)
    mixed = preset.dtype in (torch.bfloat16, torch.float16)
    wide = torch.promote_types(preset.dtype, torch.float32)
    quantised = None if preset.quantization is None else QUANTIZED_BYTES[preset.quantization]
    setting = StepSetting(preset.dtype, wide, mixed, quantised, device=device.type)
    layers = recomputable_layers(shape, config) if recompute else []
    return estimate_memory(shape, config, step, setting, layers).total


def _baseline_bytes(preset: Preset) -> int:
    """In the backward of the loss: the base, the generators and the moments of AdamW, the input of every decoder layer.

    And the logits in float32, their log-probabilities and the gradient; where the base is narrower, the logits and the
    gradient in its dtype too.
    """
    tokens, width = 2 * preset.segment_tokens, preset.dtype.itemsize
    kept = width * preset.layers * tokens * preset.hidden
    logits = (3 * 4 + (2 * width if width < 4 else 0)) * tokens * preset.vocabulary
    return width * shape_of(preset).parameters + 3 * 4 * generator_numbers(preset) + kept + logits


def generator_numbers(preset: Preset) -> int:
    """The parameters of all generators of a preset."""
    shape, config = shape_of(preset), preset.generator_config()
    each = sum(generator_parameters(config, shape.hidden, linear) for linear in adapted_linears(shape, config))
    return each * len(adapted_layers(shape, config))


@functools.cache
def shape_of(preset: Preset) -> ModelShape:
    """The shape of the base model; transformers takes a second or more to say."""
    return ModelShape.from_config(preset.config())
