"""`gakernels info`: versions, devices, and which implementation of each operation would run, and why."""

import argparse
import importlib
import importlib.metadata
import platform
from typing import Any

import torch

from gakernels.cli.common import add_command
from gakernels.ops.dispatch import BACKENDS, choose
from gakernels.version import __version__

OPERATIONS = ("context_state", "low_rank_polar", "lowrank_linear")
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
    print("\noperation       backend    why")
    for operation in OPERATIONS:
        available = importlib.import_module(f"gakernels.ops.{operation}").IMPLEMENTATIONS
        choice = choose(operation, available)
        missing = ", ".join(backend for backend in BACKENDS if backend not in available)
        print(f"{operation:15} {choice.backend:10} {choice.reason}; not in this version: {missing or 'nothing'}")
    return 0


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
