"""What the Triton kernels share: where they can run, and how they are launched."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gakernels.ops import gpus

MINIMUM_CAPABILITY = (8, 0)
LEAST_SHARED_MEMORY = 101_376  # bytes a program: what the launch settings for the smallest GPUs keep to


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU: `TRITON_INTERPRET=1` when they were imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def obstacle(device: torch.device) -> str | None:
    """Why Triton kernels can't run on a device, or None if they can."""
    if interpreting():
        return None
    gpu = gpus.gpu_of(device.type, device.index)
    if gpu is None:
        return f"Triton kernels need an NVIDIA GPU, but the tensors are on {device.type} (or set TRITON_INTERPRET=1)"
    if gpu.capability < MINIMUM_CAPABILITY:
        return f"Triton kernels need compute capability 8.0, but this GPU has {gpu.architecture}"
    if gpu.shared_memory < LEAST_SHARED_MEMORY:
        return (
            f"Triton kernels need {LEAST_SHARED_MEMORY:,} bytes of shared memory per program, but this GPU has "
            f"{gpu.shared_memory:,}"
        )
    return None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a Triton kernel. Every launch of the library goes through here, so that tools can observe it.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: programs in each direction; nothing is started if one of them is 0.
        arguments: its tensors and numbers.
        options: its `constexpr` arguments, `num_warps` and `num_stages`.
    """
    if 0 not in grid:
        _launcher(kernel, grid, arguments, options)


def _start(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device_of(first):  # Triton launches on the current device, which may be another one
        kernel[grid](*arguments, **options)


Launcher = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_launcher: Launcher = _start


def exchange_launcher(launcher: Launcher) -> Launcher:
    """Send every launch to another function, such as one that only compiles; returns the previous one."""
    global _launcher
    _launcher, before = launcher, _launcher
    return before
