"""What accelerate's hooks do with a module: where it computes, and where its weights are kept.

accelerate itself is not needed: without it no model has these hooks.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def _hooks(module: Any) -> list[Any]:
    module = getattr(module, "original", module)  # one of our modules that replaces another
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def only_aligns(module: nn.Module) -> bool:
    """Whether a module has accelerate's forward, and it only moves the input to the module's device."""
    hooks = _hooks(module)
    return bool(hooks) and all(getattr(hook, "offload", None) is False for hook in hooks)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its first tensor, or the one that its weights are brought to."""
    device = next(chain(module.parameters(), module.buffers())).device
    if device.type != "meta":
        return device
    places = [getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks(part)]
    return next((torch.empty(0, device=place).device for place in places if place is not None), device)


def offloaded_weight(module: nn.Module, attribute: str) -> Tensor | None:
    """The stored copy of a weight that is loaded for each forward pass; None if the weight is not offloaded."""
    maps = [getattr(hook, "weights_map", None) for hook in _hooks(module)]
    return next((weights[attribute] for weights in maps if weights is not None), None)
