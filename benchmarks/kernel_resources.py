"""What every Triton kernel needs on a Hopper GPU, found by compiling it with its shipped settings. No GPU is needed.

    python -m benchmarks.kernel_resources --store

The operations run forward and backward on tensors without data, at the sizes of CASES; each kernel that they would
launch is compiled for sm_90 with the very arguments of the launch. Rows that differ in no setting and no specialisation
are one. The command fails where a kernel spills registers, uses the stack, or wants more shared memory than there is.
--target takes another architecture, with the launch settings that its GPUs get, to see that all fits there. With
--store the rows for sm_90 go to `benchmarks/results/kernels/`, one file for each version of Triton, and from all files
there docs/kernel_resources.md is made.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import RESULTS, ROOT
from gakernels.files import write_text
from gakernels.ops import gpus, launching
from gakernels.ops.dispatch import missing, module

STORE = RESULTS / "kernels"
PAGE = ROOT / "docs" / "kernel_resources.md"
HOPPER = 90
TARGETS = {80: "NVIDIA A100", 89: "NVIDIA GeForce RTX 4090", HOPPER: "NVIDIA H200", 120: "NVIDIA GeForce RTX 5090"}
SHARED_LIMIT = gpus.known(TARGETS[HOPPER]).shared_memory
SHARED_OF_SM, REGISTERS_OF_SM, WARPS_OF_SM, BLOCKS_OF_SM = 228 * 1024, 65_536, 64, 32
OPERATIONS = ("context_state", "low_rank_polar", "lowrank_linear")


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Attributes:
        settings: its `constexpr` arguments, `num_warps` and `num_stages`.
        cases: the cases that launch it so.
        shared: bytes of shared memory a program.
        spills: instructions that spill registers or load them back.
        programs_per_sm: how many fit a multiprocessor at once.
        wgmma, mma: matrix instructions of Hopper's and of the older kind.
        async_copies: asynchronous copies from global to shared memory (cp.async and TMA).
        in_flight: groups of such copies that may be under way while the kernel computes; 0 where it waits for all.
    """

    operation: str
    kernel: str
    dtypes: str
    settings: dict[str, int]
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
        """What forbids to ship it for a Hopper GPU."""
        found = []
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of stack and {self.spills} spill instructions")
        if self.shared > SHARED_LIMIT:
            found.append(f"{self.shared} bytes of shared memory, but there are {SHARED_LIMIT}")
        if not self.programs_per_sm:
            found.append(f"{self.registers} registers a thread do not fit a multiprocessor")
        return found


@dataclass(frozen=True)
class Case:
    """A call of an operation on tensors without data."""

    operation: str
    name: str
    run: Callable[[Any], None]  # with the module of the kernels


def compile_all(operations: tuple[str, ...] = OPERATIONS, only: str = "", target: int = HOPPER) -> list[Resources]:
    """Compile what the cases of the operations launch, each kernel and specialisation once.

    Args:
        only: a part of the names of the cases that are wanted.
        target: the architecture, one of TARGETS.
    """
    with compiling_for(target), gpus.pretend(gpus.known(TARGETS[target])):
        found: dict[str, Resources] = {}
        for case in CASES:
            if case.operation in operations and only in case.name:
                with _recording(case, found):
                    case.run(module(case.operation, "triton"))
    return list(found.values())


@contextlib.contextmanager
def compiling_for(target: int = 90) -> Iterator[None]:
    """Triton compiles for a GPU of this compute capability while the block runs; none is asked for."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Compiler:
        """A driver without a device, as far as `warmup` asks for one."""

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
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to go back to
            driver.reset_active()


@contextlib.contextmanager
def _recording(case: Case, found: dict[str, Resources]) -> Iterator[None]:
    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        if compiled.hash in found:
            if case.name not in found[compiled.hash].cases:
                found[compiled.hash].cases.append(case.name)
            return
        tensors = [str(a.dtype).removeprefix("torch.") for a in arguments if isinstance(a, Tensor)]
        dtypes = ", ".join(dict.fromkeys(tensors))
        found[compiled.hash] = _resources(case, kernel.fn.__name__, dtypes, dict(options), compiled)

    before = launching.exchange_launcher(record)
    try:
        yield
    finally:
        launching.exchange_launcher(before)


def _resources(case: Case, kernel: str, dtypes: str, settings: dict[str, int], compiled: Any) -> Resources:
    usage, code = _disassembled(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    ptx, threads = compiled.asm["ptx"], 32 * compiled.metadata.num_warps
    return Resources(
        case.operation,
        kernel,
        dtypes,
        settings,
        [case.name],
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
    """Registers are given out by 8 to a thread, shared memory with 1 KiB for the system."""
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
) -> Callable[[Any], None]:
    def run(kernels: Any) -> None:
        inputs = _empty(rows, 8, 1024, hidden, dtype=dtype)
        a2, b1 = _empty(state, hidden, dtype=dtype), _empty(hidden, state, dtype=dtype)
        mask = _empty(rows, 8, 1024, dtype=torch.bool) if masked else None
        initial = _empty(rows, state, state, dtype=torch.float32) if masked else None
        states, projected = kernels.forward(inputs, a2, b1, mask, initial)
        kernels.backward(states, inputs, a2, b1, mask, projected, (True, True, True))

    return run


def _low_rank_polar(state: int, rank: int, batch: int) -> Callable[[Any], None]:
    def run(kernels: Any) -> None:
        states, sketch = _empty(batch, state, state, dtype=torch.float32), _empty(state, rank, dtype=torch.float32)
        u, v, steps = kernels.forward(states, sketch, 1, 1e-3)
        kernels.backward(u, v, states, sketch, steps, 1e-3)

    return run


def _lowrank_linear(
    layer: tuple[int, int], rank: int, dtype: torch.dtype, *, adapters: int | None = None, tokens: int = 1024
) -> Callable[[Any], None]:
    """16 windows; with a bias and an index where the number of adapters is given."""

    def run(kernels: Any) -> None:
        inputs, outputs = layer
        x, weight = _empty(16, tokens, inputs, dtype=dtype), _empty(outputs, inputs, dtype=dtype)
        lora_a, lora_b = (_empty(adapters or 16, *sizes, dtype=dtype) for sizes in ((rank, inputs), (outputs, rank)))
        index = _empty(16, dtype=torch.int64) if adapters else None
        bias = _empty(outputs, dtype=dtype) if adapters else None
        y, z = kernels.forward(x, weight, lora_a, lora_b, 0.0625, index, bias)
        kernels.backward(y, x, z, weight, lora_a, lora_b, 0.0625, index, True)

    return run


def _with_tf32(run: Callable[[Any], None]) -> Callable[[Any], None]:
    def permitted(kernels: Any) -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            run(kernels)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    return permitted


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _cases() -> Iterator[Case]:
    for hidden in (2048, 4096, 5120, 8192):
        for state in (512, 1024):
            for name, dtype in DTYPES.items():
                label = f"hidden {hidden}, state {state}, {name}"
                yield Case("context_state", label, _context_state(hidden, state, dtype))
                if hidden == 4096:
                    yield Case("context_state", f"{label}, masked", _context_state(hidden, state, dtype, masked=True))
                    yield Case("context_state", f"{label}, 2 rows", _context_state(hidden, state, dtype, rows=2))
        yield Case(
            "context_state",
            f"hidden {hidden}, tf32",
            _with_tf32(_context_state(hidden, 1024, torch.float32, masked=True)),
        )
    for state in (512, 1024):
        for rank in (64, 128):
            for batch in (8, 256):
                yield Case(
                    "low_rank_polar", f"state {state}, rank {rank}, {batch}", _low_rank_polar(state, rank, batch)
                )
    yield from _linear_cases()


def _linear_cases() -> Iterator[Case]:
    for layer in [(h, h) for h in (2048, 4096, 5120, 8192)] + [(14336, 4096)]:
        for rank in (64, 128):
            for name, dtype in DTYPES.items():
                for suffix, adapters in (("", None), (", indexed", 8)):
                    label = f"{layer[0]} -> {layer[1]}, rank {rank}, {name}{suffix}"
                    yield Case("lowrank_linear", label, _lowrank_linear(layer, rank, dtype, adapters=adapters))
    square, float32 = (4096, 4096), torch.float32
    for name, dtype in DTYPES.items():
        label = f"4096 -> 4096, rank 128, {name}"
        yield Case("lowrank_linear", f"{label}, one adapter", _lowrank_linear(square, 128, dtype, adapters=1))
        yield Case("lowrank_linear", f"{label}, 16 tokens", _lowrank_linear(square, 128, dtype, adapters=8, tokens=16))
        yield Case("lowrank_linear", f"4096 -> 4096, rank 8, {name}", _lowrank_linear(square, 8, dtype, adapters=8))
        yield Case("lowrank_linear", f"4095 -> 4093, rank 100, {name}", _lowrank_linear((4095, 4093), 100, dtype))
    label, run = "4096 -> 4096, rank 128, fp32 with TF32", _lowrank_linear(square, 128, float32, adapters=8)
    yield Case("lowrank_linear", label, _with_tf32(run))


CASES = tuple(_cases())


def to_document(rows: list[Resources], target: int = HOPPER) -> dict[str, Any]:
    """What a stored file holds."""
    import triton

    return {"triton": triton.__version__, "target": f"sm_{target}", "rows": [asdict(row) for row in rows]}


def page(documents: list[dict[str, Any]]) -> str:
    """docs/kernel_resources.md."""
    lines = [
        "# What the Triton kernels need on a Hopper GPU",
        "",
        "Made by `python -m benchmarks.kernel_resources --store`, which compiles every kernel for sm_90 with its",
        "shipped settings (`gakernels/ops/tuned/`), without a GPU. A test compiles and compares. No",
        f"kernel spills or uses the stack, and none wants more than the {SHARED_LIMIT:,} bytes of shared memory that a",
        "program can have. `programs/SM` is how many fit a multiprocessor by registers, shared memory and warps.",
        "`wgmma` and `mma` are matrix instructions in the code, of Hopper's kind and of the older one (float64, and",
        "float32 where TF32 is not allowed in a single pass); `copies` are asynchronous copies to shared memory, of",
        "which `in flight` groups may be under way while the kernel computes. The",
        "first case that uses a kernel is named, and how many others do.",
    ]
    for document in documents:
        lines += ["", f"## Triton {document['triton']}"]
        for operation in OPERATIONS:
            rows = [row for row in document["rows"] if row["operation"] == operation]
            lines += ["", f"### {operation}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    heads = (
        "kernel",
        "dtypes",
        "settings",
        "registers",
        "shared",
        "programs/SM",
        "wgmma",
        "mma",
        "copies",
        "in flight",
        "case",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        settings = " ".join(f"{name}={value}" for name, value in row["settings"].items())
        others = f" (+ {len(row['cases']) - 1})" if len(row["cases"]) > 1 else ""
        numbers = (
            row[name]
            for name in ("registers", "shared", "programs_per_sm", "wgmma", "mma", "async_copies", "in_flight")
        )
        cells = (row["kernel"], row["dtypes"], settings, *numbers, f"{row['cases'][0]}{others}")
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 1 where a kernel has a fault, 2 where there is no Triton."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_resources", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--store", action="store_true", help="write them where they are kept, and make the page anew")
    parser.add_argument("--target", type=int, default=HOPPER, choices=TARGETS, help="architecture (default: 90)")
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--only", default="", help="only the cases with this text in their names")
    options = parser.parse_args(arguments)
    if launching.interpreting():
        print("TRITON_INTERPRET is set: the kernels would be interpreted, not compiled", file=sys.stderr)
        return 2
    for operation in options.operations:
        reason = missing(operation, "triton")
        if reason is not None:
            print(f"can't compile the kernels of {operation}: {reason}", file=sys.stderr)
            return 2
    if options.store and (options.only or tuple(options.operations) != OPERATIONS):
        parser.error("--store keeps the rows of all cases: leave out --operations and --only")
    if options.store and options.target != HOPPER:
        parser.error(f"--store keeps the rows for sm_{HOPPER} alone: leave out --target")
    rows = compile_all(tuple(options.operations), options.only, options.target)
    for row in rows:
        print(_line(row))
    document = to_document(rows, options.target)
    if options.json:
        write_text(options.json, json.dumps(document, indent=1) + "\n")
    if options.store:
        write_text(STORE / f"sm_90-triton-{document['triton']}.json", json.dumps(document, indent=1) + "\n")
        stored = sorted(STORE.glob("*.json"))
        write_text(PAGE, page([json.loads(path.read_text(encoding="utf-8")) for path in stored]))
    faults = [(row, row.faults if options.target == HOPPER else excess(row, options.target)) for row in rows]
    for row, found in faults:
        if found:
            print(f"{row.operation}.{row.kernel} {row.settings}: {'; '.join(found)}", file=sys.stderr)
    return 1 if any(found for _, found in faults) else 0


def excess(row: Resources, target: int) -> list[str]:
    """What keeps a kernel from running on another architecture at all; spills only make it slow there."""
    limit = gpus.known(TARGETS[target]).shared_memory
    return [f"{row.shared} bytes of shared memory, but there are {limit}"] if row.shared > limit else []


def _line(row: Resources) -> str:
    settings = " ".join(f"{name}={value}" for name, value in row.settings.items())
    return (
        f"{row.operation}.{row.kernel} [{row.dtypes}] {settings}: {row.registers} registers, {row.shared} B shared, "
        f"{row.programs_per_sm} programs/SM, {row.wgmma} wgmma, {row.mma} mma, {row.async_copies} async copies, "
        f"{row.in_flight} in flight"
    )


if __name__ == "__main__":
    sys.exit(main())
