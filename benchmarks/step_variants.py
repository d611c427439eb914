"""Variants of the library's own training step: what each switches on while it runs."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.config as dynamo

from benchmarks.parts import paused
from gakernels import GenerativeAdapter
from gakernels.cost.memory import set_recomputation
from gakernels.model.attachment import decoder_layers
from gakernels.model.compilation import compile_layers

OVERLAP = ("overlap", "overlap_compiled")
COMPILED_LAYERS = ("compiled_layers", "overlap_compiled")
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


def _without_clock(forward: Callable[..., object]) -> Callable[..., object]:
    def run(*args: object, **kwargs: object) -> object:
        with paused():
            return forward(*args, **kwargs)

    return run
