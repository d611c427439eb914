"""`gakernels info`: versions, devices, and which implementation of each operation would run, and why."""

import argparse
import contextlib
import importlib.metadata
import platform
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gakernels.cli.call_options import add_call_options, planned_calls, recipe_of_calls
from gakernels.cli.common import add_command
from gakernels.ops import gpus
from gakernels.ops.dispatch import BACKENDS, choose, why_not
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING
from gakernels.ops.low_rank_polar.precision import EXACT_BELOW
from gakernels.ops.measured import calibration
from gakernels.training.planned_calls import Call
from gakernels.training.pretraining_recipe import PretrainingRecipe
from gakernels.version import __version__

WIDTH = 80
ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")  # which may be preloaded (docs/training.md, On a CPU)
PACKAGES = ("torch", "transformers", "safetensors", "triton", "peft", "flash-attn")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "info",
        run,
        "Show versions, devices, and which implementation of each operation would run, and why.",
        "  gakernels info --model mistral-7b --gpu 'NVIDIA H200'",
    )
    add_call_options(parser)
    parser.add_argument(
        "--gpu", metavar="NAME", help="GPU to report on, which need not be in this machine, such as 'NVIDIA H200'"
    )


def run(options: argparse.Namespace) -> int:
    """Print everything that a bug report needs or, for a model or recipe, the backend of each of its calls."""
    gpu = gpus.known(options.gpu) if options.gpu else gpus.gpu_of("cuda", None) if torch.cuda.is_available() else None
    with gpus.pretend(gpu) if gpu is not None else contextlib.nullcontext():
        if options.model or options.config or options.set:
            _print_calls(recipe_of_calls(options), gpu)
        else:
            _print_installation(gpu)
    return 0


def _print_installation(gpu: gpus.Gpu | None) -> None:
    print(f"gakernels     {__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:13} {_version(package)}")
    for line in _devices():
        print(line)
    if gpu is not None:
        print(_calibration(gpu))
    where = "the CPU" if gpu is None else gpu.name
    print(f"\noperation       backend    why (on {where}, at the paper's sizes in bfloat16)")
    for operation, example in EXAMPLES.items():
        arguments = example(torch.device("meta" if gpu is not None else "cpu"))
        choice = choose(operation, *arguments)
        _print_wrapped(f"{operation:15} {choice.backend:10} ", choice.reason)
        for backend in BACKENDS[2:]:
            _print_wrapped(f"{'':15} {backend:10} ", why_not(operation, backend, *arguments) or "can run")
    print()
    _print_wrapped(
        "precision       ",
        f"of low_rank_polar: float32 products for a damping from {EXACT_BELOW:g} on (the default: "
        f"{DEFAULT_DAMPING:g}), below it float64 throughout (triton: float32 products always)",
    )


def _print_wrapped(head: str, text: str) -> None:
    """Print a line; what does not fit continues below the text."""
    print(textwrap.fill(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False))


def _calibration(gpu: gpus.Gpu) -> str:
    """What `gakernels calibrate` found for a GPU."""
    record = calibration.stored(gpu)
    if record is None:
        return f"calibration   none for {gpu.name} (`{calibration.COMMAND}` makes one)"
    others = [f"{name} {version}" for name, version in record["versions"].items()]
    if record["versions"] != calibration.versions():
        return f"calibration   not used: it was made with {', '.join(others)}; run `{calibration.COMMAND}`"
    wrong = [name for name, fault in record["checks"].items() if fault]
    return f"calibration   of {record['date'][:10]}: {len(record['rows'])} calls" + (
        f"; WRONG and off: {', '.join(wrong)}" if wrong else ""
    )


def _print_calls(recipe: PretrainingRecipe, gpu: gpus.Gpu | None) -> None:
    generator, stages = recipe.generator, planned_calls(recipe)
    _print_wrapped(
        "",
        f"{recipe.model.name} on {'the CPU' if gpu is None else gpu.name}: {', '.join(generator.linears)}, d_r "
        f"{generator.state_size}, r {generator.rank}, chunks of {generator.chunk_size} tokens",
    )
    for stage, calls in stages.items():
        print(f"\n{stage}")
        for call in calls:
            sizes = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in call.sizes)
            passes = ", with backward" if call.training else ""
            dtype = str(call.dtype).removeprefix("torch.")
            _print_wrapped("  ", f"{call.operation} {dtype}: {sizes}{passes}")
            _print_wrapped(f"    {call.choice.backend:9} ", f"{call.choice.reason}{_share(call)}")


def _share(call: Call) -> str:
    """The expected rate of the forward, if there is a matrix product in it."""
    if call.operation == "gated_product":
        return ""
    if call.choice.gemm_share is None:
        return "; share of the GEMM rate: not measured"
    return f"; about {call.choice.gemm_share:.0%} of the GEMM rate forward"


def _context_state_arguments(device: torch.device) -> tuple[Tensor, ...]:
    options: Any = {"device": device, "dtype": torch.bfloat16}
    return (
        torch.empty(1, 8, 1024, 4096, **options),
        torch.empty(1024, 4096, **options),
        torch.empty(4096, 1024, **options),
    )


def _delta_state_arguments(device: torch.device) -> tuple[Tensor, ...]:
    return *_context_state_arguments(device), torch.empty(1, 8, 1024, device=device)


def _low_rank_polar_arguments(device: torch.device) -> tuple[Any, ...]:
    return torch.empty(8, 1024, 1024, device=device), torch.empty(1024, 128, device=device), 1, DEFAULT_DAMPING


def _lowrank_linear_arguments(device: torch.device) -> tuple[Tensor, ...]:
    options: Any = {"device": device, "dtype": torch.bfloat16}
    x, weight = torch.empty(16, 1024, 4096, **options), torch.empty(4096, 4096, **options)
    return x, weight, torch.empty(16, 128, 4096, **options), torch.empty(16, 4096, 128, **options)


def _gated_product_arguments(device: torch.device) -> tuple[Tensor, ...]:
    gate, up = (torch.empty(16, 1024, 14336, device=device, dtype=torch.bfloat16) for _ in range(2))
    return gate, up


EXAMPLES: dict[str, Callable[[torch.device], tuple[Any, ...]]] = {
    "context_state": _context_state_arguments,
    "delta_state": _delta_state_arguments,
    "low_rank_polar": _low_rank_polar_arguments,
    "lowrank_linear": _lowrank_linear_arguments,
    "gated_product": _gated_product_arguments,
}


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # with the build, as in 2.13.0+cu130
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _allocator() -> str:
    """The library that serves malloc in this process; on a CPU long runs may depend on it."""
    with contextlib.suppress(OSError):  # no Linux
        mapped = Path("/proc/self/maps").read_text()
        return next((name for name in ALLOCATORS if f"lib{name}" in mapped), f"{platform.libc_ver()[0]}'s malloc")
    return "the system's malloc"


def _devices() -> list[str]:
    lines = [
        f"cpu           {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        f"memory        from {_allocator()}",
    ]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = properties.total_memory / 2**30
        capability = f"sm_{properties.major}{properties.minor}"
        lines.append(
            f"cuda:{number}        {properties.name}, {memory:.0f} GiB, {capability}, CUDA {torch.version.cuda}"
        )
    return lines
