"""torch.compile of the frozen decoder layers, which fuses what lies between their matrix products."""

from typing import Any

import torch
from transformers import PreTrainedModel

from gakernels.attachment import decoder_layers


def compile_layers(base: PreTrainedModel, **options: Any) -> None:
    """Compile every decoder layer, forward and backward, one at a time; layers that are alike share a graph.

    The operations of this library stay one node each. The generators run in front of a layer, outside its graph; where
    they overlap with it (`GenerativeAdapter.overlap_generators`) the graph is cut where their adapter is waited for.
    The model computes the same up to rounding. A compiled layer can't be copied or pickled.

    Args:
        base: the base model of a `GenerativeAdapter`, or any other.
        options: for `torch.compile`; shapes are static unless `dynamic` says otherwise.
    """
    for layer in decoder_layers(base)[1]:
        plain: Any = type(layer).forward.__get__(layer)
        layer.forward = torch.compile(plain, **{"dynamic": False, **options})


def uncompile_layers(base: PreTrainedModel) -> None:
    """The opposite of `compile_layers`; nothing happens where nothing is compiled."""
    for layer in decoder_layers(base)[1]:
        layer.__dict__.pop("forward", None)
