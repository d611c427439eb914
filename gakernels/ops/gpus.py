"""The properties of a GPU that the rules need, also if it is not installed: name, compute capability, shared memory."""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gakernels.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: as the driver reports it, `NVIDIA H200`.
        capability: its compute capability, (9, 0).
        shared_memory: bytes of shared memory that one program may use.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int

    @property
    def architecture(self) -> str:
        """The compute capability as text, `9.0`."""
        return f"{self.capability[0]}.{self.capability[1]}"


# GPUs that can be asked about without having one: a pattern of their names, and what the CUDA C++ Programming Guide
# says about their compute capability (maximum shared memory of a block).
_KNOWN = (
    (r"\b(GB?200|B100|B200)\b", (10, 0), 232_448),
    (r"\b(GH200|H100|H200|H20|H800)\b", (9, 0), 232_448),
    (r"\b(A100|A800|A30)\b", (8, 0), 166_912),
    (r"\bRTX (50\d0|PRO \d{4})\b", (12, 0), 101_376),
    (r"\b(RTX 40\d0|L4|L40S?|RTX \d{4} Ada)\b", (8, 9), 101_376),
    (r"\b(RTX 30\d0|A10|A40|RTX A\d{4})\b", (8, 6), 101_376),
)

_stand_in: Gpu | None = None


def known(name: str) -> Gpu:
    """The GPU of a name, without asking a driver.

    Raises:
        InputError: no GPU of that name is known.
    """
    for pattern, capability, shared_memory in _KNOWN:
        if re.search(pattern, name, re.IGNORECASE):
            return Gpu(name, capability, shared_memory)
    raise InputError(
        "gpu must be the name of a known GPU, as 'NVIDIA H200', 'NVIDIA A100-SXM4-80GB' or "
        f"'NVIDIA GeForce RTX 4090', but it is {name!r}"
    )


@contextmanager
def pretend(gpu: Gpu) -> Iterator[None]:
    """Treat every tensor within the block as on that GPU, to find what would run there with tensors without data."""
    global _stand_in
    before, _stand_in = _stand_in, gpu
    try:
        yield
    finally:
        _stand_in = before


# torch.compile takes what the driver says for constant.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def gpu_of(kind: str, index: int | None) -> Gpu | None:
    """The GPU of a device by its type and number; None if the device is not an NVIDIA GPU."""
    if _stand_in is not None:
        return _stand_in
    if kind != "cuda":
        return None
    return _asked(torch.cuda.current_device() if index is None else index)


@functools.cache
def _asked(index: int) -> Gpu:
    properties: Any = torch.cuda.get_device_properties(index)  # its type names too few attributes
    capability = properties.major, properties.minor
    return Gpu(properties.name, capability, properties.shared_memory_per_block_optin)


def slug(gpu: str) -> str:
    """A GPU's name as a file name: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
