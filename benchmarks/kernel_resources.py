"""The resources of every Triton kernel on a Hopper GPU, found by compiling it with its shipped settings, without a GPU.

    python -m benchmarks.kernel_resources --store

The operations run forward and backward on tensors without data, at the sizes of CALLS; each kernel that they would
launch is compiled for sm_90 with the exact arguments of the launch. Rows with equal settings and specialisation
are merged. The command fails if a kernel spills registers, uses the stack, or wants more shared memory than there is.
--target takes another architecture, with the launch settings of its GPUs, to check that everything fits there. With
--store the rows are written to `benchmarks/results/kernels/`, one table per version of Triton.
"""

import argparse
import contextlib
import csv
import functools
import io
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import first_line
from benchmarks.operations import Operation, operations
from benchmarks.rows import RESULTS, command_output
from gakernels.files import write_text
from gakernels.ops import gpus, launching, tuned
from gakernels.ops.dispatch import OPERATIONS, missing, module

STORE = RESULTS / "kernels"
HOPPER = 90
TARGETS = {80: "NVIDIA A100", 89: "NVIDIA GeForce RTX 4090", HOPPER: "NVIDIA H200", 120: "NVIDIA GeForce RTX 5090"}
SHARED_LIMIT = gpus.known(TARGETS[HOPPER]).shared_memory
SHARED_OF_SM, REGISTERS_OF_SM, WARPS_OF_SM, BLOCKS_OF_SM = 228 * 1024, 65_536, 64, 32


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Attributes:
        settings: its `constexpr` arguments, `num_warps` and `num_stages`.
        cases: the cases that launch it with these settings.
        shared: bytes of shared memory per program.
        spills: instructions that spill registers or load them back.
        programs_per_sm: how many fit on a multiprocessor at once.
        wgmma, mma: matrix instructions of Hopper's and of the older kind.
        async_copies: asynchronous copies from global to shared memory (cp.async and TMA).
        in_flight: groups of such copies that may be in flight while the kernel computes; 0 if it waits for all.
    """

    operation: str
    kernel: str
    dtypes: str
    settings: dict[str, str]
    cases: list[str]
    registers: int
    shared: int
    stack: int
    spills: int
    programs_per_sm: int
    wgmma: int
    mma: int
    async_copies: int
    in_flight: int

    @property
    def faults(self) -> list[str]:
        """The reasons not to ship it for a Hopper GPU."""
        found = []
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of stack and {self.spills} spill instructions")
        if self.shared > SHARED_LIMIT:
            found.append(f"{self.shared} bytes of shared memory, but there are {SHARED_LIMIT}")
        if not self.programs_per_sm:
            found.append(f"{self.registers} registers a thread do not fit a multiprocessor")
        return found


COLUMNS = sorted((entry.name for entry in fields(Resources)), key=lambda name: name == "cases")


@dataclass(frozen=True)
class KernelCall:
    """A call of an operation on tensors without data, forward and backward."""

    operation: str
    name: str
    arguments: Callable[[], tuple[Any, ...]]
    tf32: bool = False

    def run(self) -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        if self.tf32:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            both_passes(self.operation, self.arguments())
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def compile_all(operations: tuple[str, ...] = OPERATIONS, only: str = "", target: int = HOPPER) -> list[Resources]:
    """Compile what the calls of the operations launch, each kernel and specialisation once.

    Args:
        only: a part of the names of the calls to compile.
        target: the architecture, one of TARGETS.
    """
    with compiling_for(target), gpus.pretend(gpus.known(TARGETS[target])):
        found: dict[str, Resources] = {}
        for call in CALLS:
            if call.operation in operations and only in call.name:
                with _recording(call, found):
                    call.run()
    return list(found.values())


@contextmanager
def compiling_for(target: int = 90) -> Iterator[None]:
    """Make Triton compile for a GPU of this compute capability while the block runs, without asking for a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Compiler:
        """A driver without a device, as much of it as `warmup` needs."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", target, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver.set_active(Compiler())
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to restore
            driver.reset_active()


@contextmanager
def _recording(call: KernelCall, found: dict[str, Resources]) -> Iterator[None]:
    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        if compiled.hash in found:
            if call.name not in found[compiled.hash].cases:
                found[compiled.hash].cases.append(call.name)
            return
        tensors = [str(a.dtype).removeprefix("torch.") for a in arguments if isinstance(a, Tensor)]
        dtypes = ", ".join(dict.fromkeys(tensors))
        found[compiled.hash] = _resources(call, kernel.fn.__name__, dtypes, dict(options), compiled)

    before = launching.exchange_launcher(record)
    try:
        yield
    finally:
        launching.exchange_launcher(before)


def _resources(call: KernelCall, kernel: str, dtypes: str, settings: dict[str, Any], compiled: Any) -> Resources:
    usage, code = _disassembled(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    ptx, threads = compiled.asm["ptx"], 32 * compiled.metadata.num_warps
    return Resources(
        call.operation,
        kernel,
        dtypes,
        {name: str(value) for name, value in settings.items()},
        [call.name],
        registers,
        compiled.metadata.shared,
        stack,
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        _programs_per_sm(registers, compiled.metadata.shared, threads),
        ptx.count("wgmma.mma_async"),
        len(re.findall(r"\bmma\.sync", ptx)),
        len(re.findall(r"\bcp\.async\.(?:c[ag]|bulk)", ptx)),
        max((int(groups) for groups in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)), default=0),
    )


def _programs_per_sm(registers: int, shared: int, threads: int) -> int:
    """Registers are allocated in units of 8 per thread, shared memory with 1 KiB for the system."""
    by_registers = REGISTERS_OF_SM // (-(-registers // 8) * 8 * threads)
    return min(by_registers, SHARED_OF_SM // (shared + 1024), WARPS_OF_SM * 32 // threads, BLOCKS_OF_SM)


def _disassembled(cubin: bytes) -> tuple[str, str]:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )  # type: ignore[return-value]


# The cases: the sizes of 7B to 70B models.


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _context_state(
    hidden: int, state: int, dtype: torch.dtype, *, rows: int = 1, masked: bool = False
) -> tuple[Any, ...]:
    inputs = _empty(rows, 8, 1024, hidden, dtype=dtype)
    a2, b1 = _empty(state, hidden, dtype=dtype), _empty(hidden, state, dtype=dtype)
    mask = _empty(rows, 8, 1024, dtype=torch.bool) if masked else None
    initial = _empty(rows, state, state, dtype=torch.float32) if masked else None
    return inputs, a2, b1, mask, initial


def _low_rank_polar(state: int, rank: int, batch: int) -> tuple[Any, ...]:
    return _empty(batch, state, state, dtype=torch.float32), _empty(state, rank, dtype=torch.float32), 1, 1e-3


def _lowrank_linear(
    layer: tuple[int, int], rank: int, dtype: torch.dtype, *, adapters: int | None = None, tokens: int = 1024
) -> tuple[Any, ...]:
    """16 windows; with a bias and an index if the number of adapters is given."""
    inputs, outputs = layer
    x, weight = _empty(16, tokens, inputs, dtype=dtype), _empty(outputs, inputs, dtype=dtype)
    lora_a, lora_b = (_empty(adapters or 16, *sizes, dtype=dtype) for sizes in ((rank, inputs), (outputs, rank)))
    index = _empty(16, dtype=torch.int64) if adapters else None
    bias = _empty(outputs, dtype=dtype) if adapters else None
    return x, weight, lora_a, lora_b, 0.0625, index, bias


def _gated_product(width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return _empty(8192, width, dtype=dtype), _empty(8192, width, dtype=dtype)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _calls() -> Iterator[KernelCall]:
    for hidden in (2048, 4096, 5120, 8192):
        of_states = functools.partial(_call, _context_state, hidden)
        for state in (512, 1024):
            for name, dtype in DTYPES.items():
                label = f"hidden {hidden}, state {state}, {name}"
                yield of_states(state, dtype, name=label)
                if hidden == 4096:
                    yield of_states(state, dtype, masked=True, name=f"{label}, masked")
                    yield of_states(state, dtype, rows=2, name=f"{label}, 2 rows")
        yield of_states(1024, torch.float32, masked=True, name=f"hidden {hidden}, tf32", tf32=True)
    for state in (512, 1024):
        for rank in (64, 128):
            for batch in (8, 256):
                yield _call(_low_rank_polar, state, rank, batch, name=f"state {state}, rank {rank}, {batch}")
    yield from _linear_calls()
    for name, dtype in DTYPES.items():
        yield _call(_gated_product, 14336, dtype, name=f"width 14336, {name}")
    yield _call(_gated_product, 300_000, torch.bfloat16, name="width 300000, bf16")  # more than 2^31 numbers


def _linear_calls() -> Iterator[KernelCall]:
    linear = functools.partial(_call, _lowrank_linear)
    for layer in [(h, h) for h in (2048, 4096, 5120, 8192)] + [(14336, 4096)]:
        for rank in (64, 128):
            for name, dtype in DTYPES.items():
                for suffix, adapters in (("", None), (", indexed", 8)):
                    label = f"{layer[0]} -> {layer[1]}, rank {rank}, {name}{suffix}"
                    yield linear(layer, rank, dtype, adapters=adapters, name=label)
    square = (4096, 4096)
    for name, dtype in DTYPES.items():
        label = f"4096 -> 4096, rank 128, {name}"
        yield linear(square, 128, dtype, adapters=1, name=f"{label}, one adapter")
        yield linear(square, 128, dtype, adapters=8, tokens=16, name=f"{label}, 16 tokens")
        yield linear(square, 8, dtype, adapters=8, name=f"4096 -> 4096, rank 8, {name}")
        yield linear((4095, 4093), 100, dtype, name=f"4095 -> 4093, rank 100, {name}")
    yield linear(square, 128, torch.float32, adapters=8, name="4096 -> 4096, rank 128, fp32 with TF32", tf32=True)


def _call(make: Callable[..., tuple[Any, ...]], *sizes: Any, name: str, tf32: bool = False, **more: Any) -> KernelCall:
    operation = make.__name__.removeprefix("_")
    return KernelCall(operation, name, functools.partial(make, *sizes, **more), tf32)


CALLS = tuple(_calls())


# Launches, and compiling them in advance in several processes


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
        """What distinguishes it from launches that run other code."""
        return self.kernel.fn.__name__, tuple(map(_kind, self.arguments)), tuple(sorted(self.options.items()))


def _kind(argument: Any) -> Any:
    """What Triton specialises an argument on: the dtype; whether a number is 1, a multiple of 16, of 32 bits."""
    if isinstance(argument, Tensor):
        return argument.dtype
    if isinstance(argument, int) and not isinstance(argument, bool):
        return "one" if argument == 1 else (argument % 16 == 0, -(2**31) <= argument < 2**31)
    return argument if isinstance(argument, bool | None) else type(argument)


def launches(runs: Iterable[Callable[[], object]]) -> list[Launch]:
    """The launches of some calls, each kind once; nothing is compiled or run."""
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
    """Give tensors without data the launch settings of a device while the block runs."""
    plain = tuned.settings

    def of_the_device(kernel: str, _: torch.device, dtype: torch.dtype, **sizes: int) -> dict[str, int]:
        return plain(kernel, device, dtype, **sizes)

    with patch.object(tuned, "settings", of_the_device):
        yield


_wanted: list[Launch] = []  # the processes are forks and read it here


def compile_launches(wanted: Sequence[Launch], processes: int, capability: int = 90) -> list[str]:
    """Compile in so many processes; returns a line for each launch that can't be compiled.

    The processes are forks that never use the GPU: they compile for the given compute capability.
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
    except Exception as error:  # the compiler may raise anything
        return f"{launch.kernel.fn.__name__} {launch.options}: {type(error).__name__}: {first_line(error)}"
    return ""


def preset_runs(presets: Iterable[str], names: Sequence[str], dtype: torch.dtype) -> list[Callable[[], object]]:
    """Both passes of the named operations at the sizes of some presets."""
    every = [operation for preset in presets for operation in operations(preset, torch.device("meta"), dtype)]
    return [passes_of(operation) for operation in every if operation.name in names]


def passes_of(operation: Operation) -> Callable[[], None]:
    """Both passes of an operation, with fresh random arguments."""
    return lambda: both_passes(operation.name, operation.draw(torch.Generator()))


def both_passes(operation: str, arguments: Sequence[Any]) -> None:
    """Forward and backward of an operation on tensors without data, by the Triton kernels themselves."""
    kernels = module(operation, "triton")
    if operation == "context_state":
        hidden, a2, b1, mask, _ = arguments
        states, projected = kernels.forward(*arguments)
        kernels.backward(states, hidden, a2, b1, mask, projected, (True, True, True))
    elif operation == "low_rank_polar":
        states, sketch, _, damping = arguments
        u, v, steps = kernels.forward(*arguments)
        kernels.backward(u, v, states, sketch, steps, damping)
    elif operation == "gated_product":
        kernels.backward(kernels.forward(*arguments), *arguments)
    else:
        x, weight, lora_a, lora_b, scale, index, _ = arguments
        y, z = kernels.forward(*arguments)
        kernels.backward(y, x, z, weight, lora_a, lora_b, scale, index, True)


def capability() -> int:
    """90 for compute capability 9.0, which is also the default without a GPU.

    Asks the driver's tool, because CUDA must not be initialised in processes that fork later.
    """
    answer = command_output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").splitlines()
    return int(answer[0].replace(".", "")) if answer else 90


# Tables


def to_csv(rows: Iterable[Resources]) -> str:
    """The table: a line for each kernel."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        texts = {"settings": settings_text(row.settings), "cases": "; ".join(row.cases)}
        writer.writerow(texts.get(name, getattr(row, name)) for name in COLUMNS)
    return file.getvalue()


def settings_text(settings: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 1 if a kernel has a fault, 2 if there is no Triton."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_resources", description=__doc__)
    parser.add_argument(
        "--store", nargs="?", const=STORE, type=Path, help="folder for the table (default: the kept ones)"
    )
    parser.add_argument("--target", type=int, default=HOPPER, choices=TARGETS, help="architecture (default: 90)")
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--only", default="", help="only the calls with this text in their names")
    options = parser.parse_args(arguments)
    if launching.interpreting():
        print("TRITON_INTERPRET is set: the kernels would be interpreted, not compiled", file=sys.stderr)
        return 2
    for operation in options.operations:
        reason = missing(operation, "triton")
        if reason is not None:
            print(f"can't compile the kernels of {operation}: {reason}", file=sys.stderr)
            return 2
    everything = not options.only and tuple(options.operations) == OPERATIONS and options.target == HOPPER
    if options.store == STORE and not everything:
        parser.error(
            f"{STORE} keeps the rows of all calls for sm_{HOPPER}: leave out --operations, --only and --target"
        )
    rows = compile_all(tuple(options.operations), options.only, options.target)
    for row in rows:
        print(_line(row))
    if options.store:
        import triton

        write_text(options.store / f"sm_{options.target}-triton-{triton.__version__}.csv", to_csv(rows))
    faults = [(row, row.faults if options.target == HOPPER else excess(row, options.target)) for row in rows]
    for row, found in faults:
        if found:
            print(f"{row.operation}.{row.kernel} {row.settings}: {'; '.join(found)}", file=sys.stderr)
    return 1 if any(found for _, found in faults) else 0


def excess(row: Resources, target: int) -> list[str]:
    """What keeps a kernel from running on another architecture at all; spills only make it slow."""
    limit = gpus.known(TARGETS[target]).shared_memory
    return [f"{row.shared} bytes of shared memory, but there are {limit}"] if row.shared > limit else []


def _line(row: Resources) -> str:
    return (
        f"{row.operation}.{row.kernel} [{row.dtypes}] {settings_text(row.settings)}: "
        f"{row.registers} registers, {row.shared} B shared, {row.programs_per_sm} programs/SM, "
        f"{row.wgmma} wgmma, {row.mma} mma, {row.async_copies} async copies, {row.in_flight} in flight"
    )


if __name__ == "__main__":
    sys.exit(main())
