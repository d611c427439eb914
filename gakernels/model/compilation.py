"""torch.compile for the frozen decoder layers, which fuses the operations between their matrix products."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from gakernels.errors import InputError
from gakernels.model.attachment import decoder_layers
from gakernels.nn import AdaptedLinear
from gakernels.nn.factors_in_force import HandedOver, refuse_copy
from gakernels.nn.recomputed_forward import RecomputedForward

MOST_GRAPHS = 256  # of a layer; PyTorch's own limit is 8


def compile_layers(base: PreTrainedModel, **options: Any) -> None:
    """Compile every decoder layer, forward and backward, one at a time; identical layers share a graph.

    Each operation of this library stays a single node (`gated_product` only where its kernels run). The generators run
    before a layer, outside its graph; if they overlap with it (`GenerativeAdapter.overlap_generators`), the graph
    breaks where the layer waits for their adapter. Results are the same up to rounding. A compiled layer can't be
    copied or pickled.

    Args:
        base: the base model of a `GenerativeAdapter`, or any other.
        options: passed to `torch.compile`; shapes are static unless `dynamic` says otherwise.

    Raises:
        InputError: a layer is recomputed as a whole.
    """
    layers = decoder_layers(base)[1]
    if any(isinstance(vars(layer).get("forward"), RecomputedForward) for layer in layers):
        raise InputError("layers that are recomputed as a whole can't be compiled; a larger memory_budget avoids that")
    for layer in layers:
        plain: Any = type(layer).forward.__get__(layer)
        linears = [module for module in layer.modules() if isinstance(module, AdaptedLinear)]
        layer.forward = _Compiled(torch.compile(plain, **{"dynamic": False, **options}), linears)


@contextmanager
def compiled_layers(base: PreTrainedModel) -> Iterator[None]:
    """Compile the layers while the block runs, for as many shapes as instruction tuning has.

    Raises:
        InputError: see `compile_layers`.
    """
    compile_layers(base)
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
            yield
    finally:
        uncompile_layers(base)


class _Compiled:
    """A compiled forward that passes on the active factors.

    torch.compile can't read context variables, but it supports `threading.local`.
    """

    def __init__(self, compiled: Callable[..., Any], linears: list[AdaptedLinear]) -> None:
        self._compiled = compiled
        self._places = [(linear, HandedOver()) for linear in linears]
        for linear, place in self._places:
            linear.handed_over = place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for linear, place in self._places:
            place.factors = linear.factors_now()
        try:
            return self._compiled(*args, **kwargs)
        finally:
            for _, place in self._places:
                place.factors = None  # not kept alive until the next call

    def __reduce__(self) -> Any:
        refuse_copy()


def uncompile_layers(base: PreTrainedModel) -> None:
    """The opposite of `compile_layers`; does nothing if nothing is compiled."""
    for layer in decoder_layers(base)[1]:
        if isinstance(vars(layer).get("forward"), _Compiled):
            del layer.forward
        for module in layer.modules():
            if isinstance(module, AdaptedLinear):
                module.handed_over = None
