"""`gakernels info`: versions, devices, and which implementation of each operation would run, and why."""

import argparse
import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gakernels.cli.common import add_command
from gakernels.ops.dispatch import BACKENDS, choose, why_not
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING
from gakernels.ops.low_rank_polar.precision import EXACT_BELOW
from gakernels.version import __version__

PACKAGES = ("torch", "transformers", "safetensors", "triton", "peft", "flash-attn")


def add_parser(commands: Any) -> None:
    """Add the command."""
    add_command(
        commands,
        "info",
        run,
        "Show versions, devices, and which implementation of each operation would run, and why.",
        "  GAKERNELS_BACKEND=reference gakernels info",
    )


def run(options: argparse.Namespace) -> int:
    """Print everything a bug report needs."""
    print(f"gakernels     {__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:13} {_version(package)}")
    for line in _devices():
        print(line)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\noperation       backend    why (on {device.type}, at the paper's sizes in bfloat16)")
    for operation, example in EXAMPLES.items():
        arguments = example(device)
        choice = choose(operation, *arguments)
        print(f"{operation:15} {choice.backend:10} {choice.reason}")
        for backend in BACKENDS[2:]:
            print(f"{'':15} {backend:10} {why_not(operation, backend, *arguments) or 'can run'}")
    print(
        f"\nprecision       of low_rank_polar: float32 products for a damping from {EXACT_BELOW:g} on (the default: "
        f"{DEFAULT_DAMPING:g}), under it float64 throughout (triton: float32 products always)"
    )
    return 0


def _context_state_arguments(device: torch.device) -> tuple[Tensor, ...]:
    options: Any = {"device": device, "dtype": torch.bfloat16}
    return (
        torch.empty(1, 8, 1024, 4096, **options),
        torch.empty(1024, 4096, **options),
        torch.empty(4096, 1024, **options),
    )


def _low_rank_polar_arguments(device: torch.device) -> tuple[Any, ...]:
    return torch.empty(8, 1024, 1024, device=device), torch.empty(1024, 128, device=device), 1, DEFAULT_DAMPING


def _lowrank_linear_arguments(device: torch.device) -> tuple[Tensor, ...]:
    options: Any = {"device": device, "dtype": torch.bfloat16}
    x, weight = torch.empty(16, 1024, 4096, **options), torch.empty(4096, 4096, **options)
    return x, weight, torch.empty(16, 128, 4096, **options), torch.empty(16, 4096, 128, **options)


EXAMPLES: dict[str, Callable[[torch.device], tuple[Any, ...]]] = {
    "context_state": _context_state_arguments,
    "low_rank_polar": _low_rank_polar_arguments,
    "lowrank_linear": _lowrank_linear_arguments,
}


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # with the build, as in 2.13.0+cu130
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    lines = [f"cpu           {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = properties.total_memory / 2**30
        capability = f"sm_{properties.major}{properties.minor}"
        lines.append(
            f"cuda:{number}        {properties.name}, {memory:.0f} GiB, {capability}, CUDA {torch.version.cuda}"
        )
    return lines
