"""The rule that picks the implementation of an operation.

`GAKERNELS_BACKEND` forces a backend; if that can't run, it is an error. Otherwise every call on an NVIDIA GPU goes to a
hand-written kernel that supports it, on GPUs where the kernels were checked: those with a capability in VERIFIED, and
those where `gakernels calibrate` found the kernels correct. Measurements (`measured/`) decide between the kernels, and
choose `eager` only where it was clearly faster. Everywhere else `eager` runs. docs/architecture.md explains why.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gakernels.errors import BackendError
from gakernels.ops import gpus, measured
from gakernels.ops.gpus import Gpu
from gakernels.ops.measured import Measurement, calibration, costs

HOPPER = (9, 0)
# By operation, the compute capabilities of the GPUs on which its kernels passed their tests (docs/verification.md).
VERIFIED: dict[str, tuple[tuple[int, int], ...]] = {
    "context_state": (HOPPER,),
    "low_rank_polar": (HOPPER,),
    "lowrank_linear": (HOPPER,),
    "gated_product": (),
}
OPERATIONS = tuple(VERIFIED)
BACKENDS = ("reference", "eager", "triton", "cuda")
KERNELS = ("cuda", "triton")  # hand-written; the first that can run where neither was measured
NEAR = 2.0  # a measurement at this distance or less (`measured.distance`) is about the call itself
CLEARLY, CLEARLY_FAR = 0.95, 0.8  # of a kernel's time that the eager form may take to run instead of it
ENVIRONMENT_VARIABLE = "GAKERNELS_BACKEND"


@dataclass(frozen=True)
class Choice:
    """The backend that runs an operation, and why.

    Attributes:
        backend: one of BACKENDS.
        reason: in words; empty while torch.compile traces.
        gemm_share: the rate of the forward expected from the measurements, over that of a large GEMM; None if nothing
            was measured.
    """

    backend: str
    reason: str
    gemm_share: float | None = None


def choose(operation: str, *arguments: Any) -> Choice:
    """Pick the backend for one call of an operation.

    Args:
        operation: its name.
        arguments: those of its public function, the first of them a tensor.

    Raises:
        BackendError: the environment variable does not name a backend, or names one that can't run these arguments
            here.
    """
    choice = _choose(operation, arguments)
    if _listener is not None:
        _listener(operation, arguments, choice)
    return choice


Listener = Callable[[str, tuple[Any, ...], Choice], None]
_listener: Listener | None = None


def exchange_listener(listener: Listener | None) -> Listener | None:
    """Set the function that is told of every call and its backend (None for no function); returns the previous one."""
    global _listener
    _listener, before = listener, _listener
    return before


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Force a backend for the calls within the block, like `GAKERNELS_BACKEND`."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = backend
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT_VARIABLE)
        if before is not None:
            os.environ[ENVIRONMENT_VARIABLE] = before


def _choose(operation: str, arguments: tuple[Any, ...]) -> Choice:
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not wanted:
        return _default(operation, arguments)
    if wanted not in BACKENDS:
        raise BackendError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)}, but it is {wanted!r}")
    obstacle = why_not(operation, wanted, *arguments)
    if obstacle is not None:
        raise BackendError(f"{ENVIRONMENT_VARIABLE}={wanted}, but that can't run {operation} here: {obstacle}")
    return Choice(wanted, f"forced by {ENVIRONMENT_VARIABLE}")


def _default(operation: str, arguments: tuple[Any, ...]) -> Choice:
    device = arguments[0].device
    if not _on_gpu(device.type):
        return Choice("eager", f"default on {device.type}: the kernels are written for NVIDIA GPUs")
    able = tuple(kernel for kernel in KERNELS if _obstacle(operation, kernel, arguments) is None)
    compiling = torch.compiler.is_compiling()
    if not able:
        return Choice("eager", "" if compiling else _obstacles(operation, arguments))
    sizes = module(operation, "eager").sizes(*arguments)
    training = needs_backward(arguments)
    if compiling:  # sizes may be symbols there, and the comparisons become guards
        rows = _rows(device.type, device.index)
        return Choice(_fastest(rows, operation, arguments[0].dtype, sizes, able, training), "")
    gpu = gpus.gpu_of(device.type, device.index)
    return _explained(gpu, operation, arguments[0].dtype, tuple(sizes.items()), able, training)


def needs_backward(arguments: tuple[Any, ...]) -> bool:
    """Whether a backward may follow a call."""
    return torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in arguments)


def _obstacle(operation: str, kernel: str, arguments: tuple[Any, ...]) -> str | None:
    """Why a kernel does not run a call by default, or None if it may."""
    device = arguments[0].device
    return why_not(operation, kernel, *arguments) or _untrusted(device.type, device.index, operation, kernel)


def _obstacles(operation: str, arguments: tuple[Any, ...]) -> str:
    """Why none of the kernels of an operation runs a call."""
    kernels = _written(operation)
    if not kernels:
        return "it has no kernels"
    return "; ".join(f"{kernel}: {_obstacle(operation, kernel, arguments)}" for kernel in kernels)


@functools.cache
def _written(operation: str) -> tuple[str, ...]:
    """The kernels that an operation has."""
    return tuple(kernel for kernel in KERNELS if importlib.util.find_spec(_name(operation, kernel)) is not None)


# torch.compile takes for constant what the driver and files say.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _on_gpu(kind: str) -> bool:
    return kind == "cuda" or gpus.gpu_of(kind, None) is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _untrusted(kind: str, index: int | None, operation: str, kernel: str) -> str | None:
    """Why a kernel does not run by default on a kind of GPU, or None if it does."""
    return _distrust(gpus.gpu_of(kind, index), operation, kernel)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _rows(kind: str, index: int | None) -> tuple[Measurement, ...]:
    return measured.rows_of(gpus.gpu_of(kind, index))


@functools.cache
def _distrust(gpu: Gpu, operation: str, kernel: str) -> str | None:
    return calibration.obstacle(gpu, operation, kernel, verified=gpu.capability in VERIFIED[operation])


def _fastest(
    rows: Sequence[Measurement],
    operation: str,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
    able: tuple[str, ...],
    training: bool,
) -> str:
    """The fastest backend by the nearest measurement; a kernel, unless eager is clearly faster.

    torch.compile traces this.
    """
    found = measured.nearest(rows, operation, dtype, sizes, able)
    if found is None:
        return able[0]
    row, distance = found
    best, best_ms = "", 0.0
    for kernel in able:
        if kernel in row.backends:
            time = costs.expected_ms(row, kernel, sizes, dtype.itemsize, training)
            if not best or time < best_ms:
                best, best_ms = kernel, time
    if "eager" not in row.backends:
        return best
    eager_ms = costs.expected_ms(row, "eager", sizes, dtype.itemsize, training)
    return "eager" if eager_ms < (CLEARLY if distance <= NEAR else CLEARLY_FAR) * best_ms else best


@functools.lru_cache(maxsize=4096)
def _explained(
    gpu: Gpu,
    operation: str,
    dtype: torch.dtype,
    sizes: tuple[tuple[str, int], ...],
    able: tuple[str, ...],
    training: bool,
) -> Choice:
    """`_fastest`, with the reason."""
    named, rows = dict(sizes), measured.rows_of(gpu)
    backend = _fastest(rows, operation, dtype, named, able, training)
    found = measured.nearest(rows, operation, dtype, named, able)
    if found is None:
        return Choice(backend, f"default on compute capability {gpu.architecture} (not measured in {_short(dtype)})")
    row, distance = found
    where = "this machine" if row.calibrated else row.gpu
    source = f"measured on {where}" if distance <= NEAR else f"nearest measurement: {where}"
    if backend == "eager":
        passes = "forward and backward" if training else "forward"
        reason = f"faster than {' and '.join(able)}, {passes} ({source}){_empty_tiles(operation, named)}"
    else:
        reason = f"default on compute capability {gpu.architecture} ({source})"
    forward = costs.expected_ms(row, backend, named, dtype.itemsize, training=False) / 1e3
    share = costs.operations(operation, named) / forward / row.gemm_flops if row.gemm_flops and forward else None
    return Choice(backend, reason, share)


def _empty_tiles(operation: str, sizes: dict[str, int]) -> str:
    if operation != "lowrank_linear" or costs.filled_tiles(sizes["tokens"]) > CLEARLY_FAR:
        return ""
    return f": tiles of the kernel hold {costs.filled_tiles(sizes['tokens']):.0%} tokens at M={sizes['tokens']}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forget() -> None:
    """Read files and records again from now on, as after a calibration."""
    measured.forget()
    _distrust.cache_clear()
    _explained.cache_clear()


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
    if backend in KERNELS:
        _load_kernels()
    loaded = _load(operation, backend)
    return loaded if isinstance(loaded, str) else None


def module(operation: str, backend: str) -> Any:
    """The module with `forward` and `backward` of a backend.

    Raises:
        BackendError: there is none.
    """
    obstacle = missing(operation, backend)
    if obstacle is not None:
        raise BackendError(f"the {backend} implementation of {operation} can't be used here: {obstacle}")
    return sys.modules[_name(operation, backend)]


@functools.cache
def _load_kernels() -> None:
    """Import all at once: torch.compile reads `sys.modules` once, and does not see later imports."""
    for operation in OPERATIONS:
        for kernel in KERNELS:
            _load(operation, kernel)


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
