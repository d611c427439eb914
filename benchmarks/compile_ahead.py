"""Compile the Triton kernels for this GPU in all processes at once, into Triton's cache, before anything is run.

    python -m benchmarks.compile_ahead --presets mistral-7b smollm2-135m

The operations run forward and backward on tensors without data, as in `kernel_resources`; each launch that differs from
the others is compiled once, in one of the processes. Later launches with the same arguments find their code in the
cache. Without a GPU the code is for sm_90.
"""

import argparse
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import first_line
from benchmarks.kernel_resources import OPERATIONS, compiling_for
from benchmarks.operations import PRESETS, Operation, operations
from benchmarks.rows import command_output
from gakernels.ops import launching, tuned
from gakernels.ops.dispatch import missing, module


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: what Triton needs to compile it."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self) -> None:
        """Compile it for the target that is set, into Triton's cache."""
        self.kernel.warmup(*self.arguments, grid=(1,), **self.options)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from launches that run other code."""
        return self.kernel.fn.__name__, tuple(map(_kind, self.arguments)), tuple(sorted(self.options.items()))


def _kind(argument: Any) -> Any:
    """What Triton specialises an argument by: the dtype; whether a number is 1, a multiple of 16, of 32 bits."""
    if isinstance(argument, Tensor):
        return argument.dtype
    if isinstance(argument, int) and not isinstance(argument, bool):
        return "one" if argument == 1 else (argument % 16 == 0, -(2**31) <= argument < 2**31)
    return argument if isinstance(argument, bool | None) else type(argument)


def launches(runs: Iterable[Callable[[], object]]) -> list[Launch]:
    """What some calls launch, each kind once; nothing is compiled or run."""
    found: dict[tuple[Any, ...], Launch] = {}

    def record(kernel: Any, _: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        launch = Launch(kernel, arguments, dict(options))
        found.setdefault(launch.key, launch)

    before = launching.exchange_launcher(record)
    try:
        for run in runs:
            run()
    finally:
        launching.exchange_launcher(before)
    return list(found.values())


@contextmanager
def settings_of(device: torch.device) -> Iterator[None]:
    """Tensors without data get the launch settings of a device while the block runs."""
    plain = tuned.settings

    def of_the_device(kernel: str, _: torch.device, dtype: torch.dtype, **sizes: int) -> dict[str, int]:
        return plain(kernel, device, dtype, **sizes)

    with patch.object(tuned, "settings", of_the_device):
        yield


_wanted: list[Launch] = []  # the processes are forks, and find it here


def compile_launches(wanted: Sequence[Launch], processes: int, capability: int = 90) -> list[str]:
    """Compile in so many processes; returns a line for each launch that can't be.

    The processes are forks that never ask for the GPU: they compile for the compute capability that they are told.
    """
    global _wanted
    _wanted = list(wanted)
    fork = multiprocessing.get_context("fork")
    with compiling_for(capability), ProcessPoolExecutor(processes, mp_context=fork) as pool:
        return [line for line in pool.map(_compile, range(len(_wanted))) if line]


def _compile(number: int) -> str:
    launch = _wanted[number]
    try:
        launch.compile()
    except Exception as error:  # whatever the compiler raises
        return f"{launch.kernel.fn.__name__} {launch.options}: {type(error).__name__}: {first_line(error)}"
    return ""


def preset_runs(presets: Iterable[str], names: Sequence[str], dtype: torch.dtype) -> list[Callable[[], object]]:
    """Both passes of the named operations at the sizes of some presets."""
    every = [operation for preset in presets for operation in operations(preset, torch.device("meta"), dtype)]
    return [functools.partial(both_passes, operation) for operation in every if operation.name in names]


def both_passes(operation: Operation) -> None:
    """Forward and backward of an operation on tensors without data, by the kernels themselves."""
    kernels, arguments = module(operation.name, "triton"), operation.draw(torch.Generator())
    if operation.name == "context_state":
        hidden, a2, b1, mask, _ = arguments
        states, projected = kernels.forward(*arguments)
        kernels.backward(states, hidden, a2, b1, mask, projected, (True, True, True))
    elif operation.name == "low_rank_polar":
        states, sketch, _, damping = arguments
        u, v, steps = kernels.forward(*arguments)
        kernels.backward(u, v, states, sketch, steps, damping)
    else:
        x, weight, lora_a, lora_b, scale, index, _ = arguments
        y, z = kernels.forward(*arguments)
        kernels.backward(y, x, z, weight, lora_a, lora_b, scale, index, True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 where a kernel can't be compiled, 2 where none can."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_ahead", description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["mistral-7b"], choices=PRESETS, help="sizes of the operations")
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    obstacles = [reason for operation in options.operations if (reason := missing(operation, "triton"))]
    if launching.interpreting():
        obstacles.append("TRITON_INTERPRET is set: the kernels would be interpreted")
    if obstacles:
        print(f"can't compile: {obstacles[0]}", file=sys.stderr)
        return 2
    started = time.monotonic()
    with settings_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        wanted = launches(preset_runs(options.presets, options.operations, getattr(torch, options.dtype)))
    failed = compile_launches(wanted, options.processes, capability())
    seconds = time.monotonic() - started
    print("\n".join([*failed, f"compiled {len(wanted) - len(failed)} of {len(wanted)} launches in {seconds:.1f} s"]))
    return 1 if failed else 0


def capability() -> int:
    """90 for compute capability 9.0, which is taken where there is no GPU.

    The driver's tool is asked: processes that are forked later must not find CUDA begun.
    """
    answer = command_output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").splitlines()
    return int(answer[0].replace(".", "")) if answer else 90


if __name__ == "__main__":
    sys.exit(main())
