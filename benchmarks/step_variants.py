"""Variants of the library's own training step: what each switches on while it runs."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.config as dynamo

from benchmarks.parts import paused
from benchmarks.presets import Preset
from gakernels import GenerativeAdapter
from gakernels.attachment import decoder_layers
from gakernels.compilation import compile_layers
from gakernels.evaluation.shapes import ModelShape
from gakernels.training.memory import (
    StepSetting,
    StepShape,
    estimate_memory,
    recomputable_layers,
    set_recomputation,
)
from gakernels.training.plan import QUANTIZED_BYTES

OVERLAP = ("overlap", "overlap_compiled")
COMPILED_LAYERS = ("compiled_layers", "overlap_compiled")
# Whose memory is that of the estimate.
ESTIMATED = ("auto", "trainer", "eager", "triton", "cuda", "overlap", "recompute")
VARIANTS = ("overlap", "compiled_layers", "overlap_compiled", "recompute")

Context = Callable[[], ExitStack]


def variant(name: str, model: GenerativeAdapter) -> Context:
    """What is in force while a provider's step runs, made anew for each step.

    `compiled` compiles the whole decoder, `compiled_layers` one layer after the other; `overlap` forms the adapters on
    a second stream; `recompute` computes gate and up of all layers again in the backward. Other names change nothing.
    """
    decoder: Any = model.base.get_decoder()
    replaced: list[tuple[Any, Any]] = []
    if name == "compiled":
        replaced.append((decoder, torch.compile(decoder.forward)))
    elif name in COMPILED_LAYERS:
        layers = decoder_layers(model.base)[1]
        compile_layers(model.base)
        replaced += [(layer, vars(layer).pop("forward")) for layer in layers]
    if replaced or name in OVERLAP:  # a clock would be compiled in, and knows one stream
        inner = replaced.pop()[1] if name == "compiled" else decoder.forward
        replaced.append((decoder, _without_clock(inner)))

    def context() -> ExitStack:
        stack = ExitStack()
        # One process compiles the layers of several models: those that are checked and those that are timed.
        stack.enter_context(dynamo.patch(recompile_limit=64))
        for module, forward in replaced:
            stack.enter_context(patch.object(module, "forward", forward))
        if name in OVERLAP:
            model.overlap_generators()
            stack.callback(model.overlap_generators, False)
        if name == "recompute":
            set_recomputation(model, range(len(decoder_layers(model.base)[1])))
            stack.callback(set_recomputation, model, [])
        return stack

    return context


def estimated_bytes(name: str, model: GenerativeAdapter, preset: Preset, device: torch.device) -> int:
    """What a step of a provider takes by the estimate of `gakernels.training.memory`, uncompiled."""
    shape = ModelShape.from_config(preset.config())
    tokens = preset.chunks * 2 * (preset.window - 1)  # of one segment: all that can be predicted
    step = replace(StepShape.pretraining(1, preset.window, preset.chunks), predicted=tokens)
    mixed = preset.dtype in (torch.bfloat16, torch.float16)
    wide = torch.promote_types(preset.dtype, torch.float32)
    quantised = None if preset.quantization is None else QUANTIZED_BYTES[preset.quantization]
    setting = StepSetting(preset.dtype, wide, mixed, quantised, device=device.type)
    layers = recomputable_layers(shape, model.config) if name == "recompute" else []
    return estimate_memory(shape, model.config, step, setting, layers).total


def _without_clock(forward: Callable[..., object]) -> Callable[..., object]:
    def run(*args: object, **kwargs: object) -> object:
        with paused():
            return forward(*args, **kwargs)

    return run
