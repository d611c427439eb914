"""How the operations behave under autocast: inputs are cast once, and nothing inside an operation is cast again.

Autocast does not know custom operators: without the guard, the matrix products inside one would be cast to the low
precision, including float32 accumulation.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def is_enabled(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device; false for devices that it does not know, such as `meta`."""
    return _is_known(device.type) and torch.is_autocast_enabled(device.type)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # PyTorch 2.11 can't trace the question
def _is_known(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def cast(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype if autocast is on. Float64 stays, as elsewhere in PyTorch."""
    if not is_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x as the last operation of an autograd Function's forward; use it instead of `x.to` there.

    If an operation returns its own input (an in-place operation, or a cast that changes nothing) and the forward
    returns that too, torch.compile in PyTorch 2.11 silently drops the gradient of the Function.
    """
    return x if x.dtype == dtype else x.to(dtype)


def without(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run the function with autocast off for the device of its first argument, a tensor."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device  # type: ignore[attr-defined]
        if not is_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return run
