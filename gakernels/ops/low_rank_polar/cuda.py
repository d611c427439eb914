"""`low_rank_polar` in CUDA C++ (csrc/, docs/low_rank_polar.md). Importing fails where the extension is not built."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gakernels.errors import BackendError
from gakernels.ops import gpus
from gakernels.ops.low_rank_polar import extension
from gakernels.ops.low_rank_polar.eager import Steps

try:
    kernels: Any = importlib.import_module("gakernels._cuda")
except ImportError as error:
    raise ImportError(f"the CUDA extension is not built or does not load ({error}): docs/low_rank_polar.md") from error


def unsupported(states: Tensor, sketch: Tensor, power_iterations: int = 1, damping: float = 1e-3) -> str | None:
    """Why the kernels can't run these arguments, or None if they can. Any number of iterations and damping will do."""
    gpu = gpus.gpu_of(states.device.type, states.device.index)
    if gpu is None:
        return f"the states are on {states.device}, and the kernels need an NVIDIA GPU"
    if not _built_for(gpu.capability):
        return (
            f"the GPU has compute capability {gpu.architecture}, and the extension was built for "
            f"{kernels.architectures} (GAKERNELS_CUDA_ARCHS)"
        )
    return extension.unsupported(states, sketch)


def forward(states: Tensor, sketch: Tensor, power_iterations: int, damping: float) -> tuple[Tensor, Tensor, Steps]:
    """Returns u, v (..., d_r, r) and the steps; launched on the current stream.

    Raises:
        BackendError: the kernels can't run these arguments, or a launch failed.
    """
    with _target(states, sketch) as target:
        return extension.forward(target, states, sketch, power_iterations, damping)


def backward(grad_u: Tensor, grad_v: Tensor, states: Tensor, sketch: Tensor, steps: Steps, damping: float) -> Tensor:
    """Gradient of the states; launched on the current stream.

    Raises:
        BackendError: the kernels can't run these arguments, or a launch failed.
    """
    with _target(states, sketch) as target:
        return extension.backward(target, grad_u, grad_v, states, sketch, steps, damping)


@contextmanager
def _target(states: Tensor, sketch: Tensor) -> Iterator[extension.Target]:
    """The states' device, which is the current one meanwhile, and its current stream."""
    obstacle = unsupported(states, sketch)
    if obstacle is not None:
        raise BackendError(f"low_rank_polar can't run in CUDA: {obstacle}")
    with torch.cuda.device(states.device):
        try:
            multiprocessors = torch.cuda.get_device_properties(states.device).multi_processor_count
            yield extension.Target(kernels, torch.cuda.current_stream().cuda_stream, multiprocessors)
        except kernels.LaunchError as error:
            raise BackendError(f"low_rank_polar: {error}") from error


# torch.compile does not trace the extension.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _built_for(capability: tuple[int, int]) -> bool:
    return any(_runs_on(name, capability) for name in kernels.architectures.split(","))


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on later chips of the same major version; that of an `a` target on its own kind only."""
    major, minor = divmod(int(architecture.rstrip("a")), 10)
    exact = architecture.endswith("a")
    return capability == (major, minor) if exact else major == capability[0] and minor <= capability[1]
