"""One rule that picks the implementation of an operation.

`GAKERNELS_BACKEND` forces a backend, and is an error where that one can't run. Otherwise a hand-written kernel is the
default only where a committed measurement on that kind of GPU shows it correct and faster (`measured/`); everywhere
else the default is `eager`.
"""

import functools
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from gakernels.errors import BackendError
from gakernels.ops import launching, measured

BACKENDS = ("reference", "eager", "triton", "cuda")
ENVIRONMENT_VARIABLE = "GAKERNELS_BACKEND"


@dataclass(frozen=True)
class Choice:
    """The backend that runs an operation, and why."""

    backend: str
    reason: str


def choose(operation: str, *arguments: Any) -> Choice:
    """Pick the backend for one call of an operation.

    Args:
        operation: its name.
        arguments: those of its public function, the first of them a tensor.

    Raises:
        BackendError: the environment variable names no backend, or one that can't run these arguments here.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not forced:
        return _default(operation, arguments)
    if forced not in BACKENDS:
        raise BackendError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)}, but it is {forced!r}")
    obstacle = why_not(operation, forced, *arguments)
    if obstacle is not None:
        raise BackendError(f"{ENVIRONMENT_VARIABLE}={forced}, but that can't run {operation} here: {obstacle}")
    return Choice(forced, f"forced by {ENVIRONMENT_VARIABLE}")


def _default(operation: str, arguments: tuple[Any, ...]) -> Choice:
    device = arguments[0].device
    if device.type != "cuda":
        return Choice("eager", f"default on {device.type}: the kernels are written for NVIDIA GPUs")
    return _default_on_gpu(operation, arguments, device.index)


def _default_on_gpu(operation: str, arguments: tuple[Any, ...], index: int | None) -> Choice:
    gpu = launching.gpu_name(index)
    sizes = module(operation, "eager").sizes(*arguments)
    backend = measured.fastest(gpu, operation, arguments[0].dtype, sizes)
    if backend is None:
        return Choice("eager", f"default: no committed measurement shows a kernel faster for these sizes on {gpu}")
    obstacle = why_not(operation, backend, *arguments)
    if obstacle is not None:
        return Choice("eager", f"{backend} measured faster on {gpu}, but can't run here: {obstacle}")
    return Choice(backend, f"measured faster on {gpu}")


def why_not(operation: str, backend: str, *arguments: Any) -> str | None:
    """Why a backend can't run these arguments of an operation here, or None if it can."""
    if backend in ("reference", "eager"):
        return None
    obstacle: str | None = missing(operation, backend)
    return module(operation, backend).unsupported(*arguments) if obstacle is None else obstacle


# torch.compile does not trace an import.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing(operation: str, backend: str) -> str | None:
    """Why a backend of an operation can't be used in this installation at all, or None if it can."""
    loaded = _load(operation, backend)
    return loaded if isinstance(loaded, str) else None


def module(operation: str, backend: str) -> Any:
    """The module with `forward` and `backward` of a backend.

    Raises:
        BackendError: it is not there.
    """
    obstacle = missing(operation, backend)
    if obstacle is not None:
        raise BackendError(f"the {backend} implementation of {operation} can't be used here: {obstacle}")
    return sys.modules[_name(operation, backend)]


@functools.cache
def _load(operation: str, backend: str) -> ModuleType | str:
    """A backend's module, or why there is none."""
    name = _name(operation, backend)
    if importlib.util.find_spec(name) is None:
        return f"{operation} has no {backend} implementation"
    try:
        return importlib.import_module(name)
    except ImportError as error:  # triton is not installed, or the CUDA extension is not built
        return str(error)


def _name(operation: str, backend: str) -> str:
    return f"gakernels.ops.{operation}.{backend}"
