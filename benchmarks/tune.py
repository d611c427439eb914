"""Find the launch settings that are fastest on this GPU, and store them.

    python -m benchmarks.tune --preset mistral-7b --dtype bfloat16 --operations lowrank_linear --store FILE

Starting from the current settings, each number of each kernel is halved and doubled (warps and pipeline stages too),
as long as that makes the operation, forward plus backward, faster by more than the noise. A candidate that does not
compile, does not fit on the GPU or is wrong is skipped. The candidates of a round are compiled by all processes at
once, then timed one by one. An improvement is stored as soon as it is found. Without --store the table of this GPU in
`gakernels/ops/tuned/` is written; GAKERNELS_TUNED=FILE uses another one. On a CPU candidates are
compiled but not timed.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.kernel_resources import capability, compiling_for, launches, passes_of, settings_of
from benchmarks.measure import Effort, dtype_name, time_call
from benchmarks.operations import PRESETS, Operation, operations, oracle_error, seeded, with_leaves
from gakernels.files import write_text
from gakernels.ops import tuned
from gakernels.ops.dispatch import OPERATIONS
from gakernels.ops.gpus import slug

Settings = dict[str, int]
GAIN = 0.98  # of the previous time: a smaller gain is noise
EFFORT = Effort(warmup=1, seconds=0.1, least=5, most=20)


def tune(
    kernel: str,
    start: Settings,
    seconds: Callable[[Settings], float | None],
    prepare: Callable[[list[Settings]], object] = lambda _: None,
    better: Callable[[Settings], object] = lambda _: None,
    deadline: float = math.inf,
) -> Settings:
    """Coordinate descent over the settings of one kernel.

    Args:
        kernel: its name, for the progress that is printed.
        start: the settings to start from.
        seconds: the time of the operation with given settings; None if they can't be used.
        prepare: called with the candidates of a round before they are timed.
        better: called with the settings whenever they are the best so far.
        deadline: on the clock of `time.monotonic`; nothing is tried after it.

    Returns:
        The best settings found; `start` if nothing else is clearly faster.
    """
    prepare([start])
    best, best_time = start, seconds(start)
    tried = {_key(start)}
    while time.monotonic() < deadline:
        candidates = [candidate for candidate in neighbours(best) if _key(candidate) not in tried]
        prepare(candidates)
        found = best
        for candidate in candidates:
            if time.monotonic() >= deadline:
                break
            tried.add(_key(candidate))
            taken = seconds(candidate)
            print(f"{kernel} {candidate}: {'not usable' if taken is None else f'{1e6 * taken:.1f} us'}", flush=True)
            if taken is not None and (best_time is None or taken < GAIN * best_time):
                found, best_time = candidate, taken
                better(found)
        if found == best:
            break
        best = found
    return best


def _key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


def neighbours(settings: Settings) -> Iterator[Settings]:
    """Settings that differ in one number: blocks and warps by a factor of two, stages and groups by one step."""
    for name, value in settings.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        lowest = {"num_stages": 1, "num_warps": 1}.get(name, 16 if name.startswith("BLOCK") else 1)
        highest = {"num_stages": 6, "num_warps": 16, "NUMBERS": 8192}.get(name, 512)
        yield from ({**settings, name: step} for step in steps if lowest <= step <= highest)


@dataclass(frozen=True)
class SettingsRequest:
    """A kernel's request to the tables, and the answer."""

    kernel: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    settings: tuple[tuple[str, int], ...]

    def entry(self, settings: Settings) -> dict[str, Any]:
        """A table entry for exactly this request."""
        return {"dtypes": [self.dtype], "sizes": dict(self.sizes), "settings": settings}


def asked(run: Callable[[], object]) -> list[SettingsRequest]:
    """The requests of the kernels that a call launches, each once."""
    found: dict[SettingsRequest, None] = {}
    plain = tuned.settings

    def record(kernel: str, device: torch.device, dtype: torch.dtype, **sizes: int) -> Settings:
        given = plain(kernel, device, dtype, **sizes)
        found[SettingsRequest(kernel, dtype_name(dtype), tuple(sizes.items()), tuple(given.items()))] = None
        return given

    with patch.object(tuned, "settings", record):
        run()
    return list(found)


@contextmanager
def in_force(launch: SettingsRequest, settings: Settings, path: Path) -> Iterator[None]:
    """Use other settings for a kernel while the block runs, ahead of the entries in the table at `path`."""
    kernels = json.loads(path.read_text())["kernels"] if path.exists() else {}
    entries = [launch.entry(settings), *kernels.get(launch.kernel, [])]
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.json"
        table.write_text(json.dumps({"kernels": {**kernels, launch.kernel: entries}}))
        with patch.dict(os.environ, {tuned.ENVIRONMENT_VARIABLE: str(table)}):
            yield


@dataclass(frozen=True)
class Sized:
    """An operation at a size, in the form given to the compiling processes."""

    preset: str
    dtype: torch.dtype
    number: int  # in `operations`

    def on(self, device: torch.device) -> Operation:
        return operations(self.preset, device, self.dtype)[self.number]


def compile_candidate(sized: Sized, launch: SettingsRequest, settings: Settings, capability: int) -> None:
    """Compile one kernel with other settings, into Triton's cache. A failure shows when it is timed."""
    name = launch.kernel.split(".")[-1]
    with tempfile.TemporaryDirectory() as folder, in_force(launch, settings, Path(folder) / "none.json"):
        found = launches([passes_of(sized.on(torch.device("meta")))])
    with compiling_for(capability):
        for wanted in found:
            if wanted.kernel.fn.__name__ == name:
                with contextlib.suppress(Exception):
                    wanted.compile()


def measure(operation: Operation) -> float | None:
    """Seconds of forward and backward with the Triton kernels, or None if they fail or are wrong, or on a CPU."""
    if operation.device.type != "cuda":
        return None
    try:
        implementation, eager = operation.implementation("triton"), operation.implementation("eager")
        if oracle_error(operation, "backward", implementation) > 4 * oracle_error(operation, "backward", eager) + 1e-6:
            return None
        arguments, leaves = with_leaves(operation, operation.draw(seeded(operation.device, 1)))

        def run(_: Any) -> None:
            returned = implementation(*arguments)
            outputs, gradients = operation.upstream(returned, torch.ones_like(operation.defined(returned)))
            torch.autograd.grad(outputs, leaves, gradients)

        return time_call(run, lambda _: None, operation.device, EFFORT).p50_ms / 1e3
    except Exception as error:  # unsuitable settings may raise anything from the compiler or the driver
        print(f"  {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
        return None


def store(path: Path, gpu: str, launch: SettingsRequest, settings: Settings) -> None:
    """Put settings ahead of a kernel's entries in a table; the rest of the table stays."""
    document: dict[str, Any] = {"gpu": gpu, "kernels": {}}
    if path.exists():
        document = json.loads(path.read_text())
    new = launch.entry(settings)
    others = [
        entry
        for entry in document["kernels"].get(launch.kernel, [])
        if (entry["dtypes"], entry.get("sizes", {})) != (new["dtypes"], new["sizes"])
    ]
    document["kernels"][launch.kernel] = [new, *others]
    write_text(path, json.dumps(document, indent=1) + "\n")


def tune_operation(sized: Sized, device: torch.device, pool: Executor, path: Path, gpu: str, deadline: float) -> None:
    """Tune one kernel after the other; improvements are stored at once, and used for the kernels after it."""
    operation, compute = sized.on(device), capability()
    print(f"{operation.name} {operation.shape}", flush=True)
    with settings_of(device):
        found = asked(lambda: launches([passes_of(sized.on(torch.device("meta")))]))
    for launch in found:

        def seconds(settings: Settings, launch: SettingsRequest = launch) -> float | None:
            with in_force(launch, settings, path):
                return measure(operation)

        def compile_all(candidates: list[Settings], launch: SettingsRequest = launch) -> None:
            list(pool.map(compile_candidate, *zip(*[(sized, launch, c, compute) for c in candidates], strict=True)))

        keep = functools.partial(store, path, gpu, launch)
        tune(launch.kernel, dict(launch.settings), seconds, compile_all, keep, deadline)
        if time.monotonic() >= deadline:
            print("the time is over")
            return


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--preset", default="mistral-7b", choices=PRESETS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--store", type=Path, help="the table to write")
    parser.add_argument("--seconds", type=float, default=math.inf, help="try nothing more after so long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("tuning needs a GPU, and there is none that this torch can use", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    processes = multiprocessing.get_context("fork")  # before anything is on the GPU, which they never use
    with ProcessPoolExecutor(os.cpu_count(), processes) as pool:
        pool.submit(os.getpid).result()
        device = torch.device(options.device)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        path = options.store or tuned.FOLDER / f"{slug(gpu)}.json"
        every = _sized(options.preset, getattr(torch, options.dtype), options.operations)
        for number, sized in enumerate(every):
            share = (deadline - time.monotonic()) / (len(every) - number)
            tune_operation(sized, device, pool, path, gpu, time.monotonic() + share)
    return 0


def _sized(preset: str, dtype: torch.dtype, wanted: Sequence[str]) -> list[Sized]:
    every = enumerate(operations(preset, torch.device("meta"), dtype))
    return [Sized(preset, dtype, number) for number, operation in every if operation.name in wanted]


if __name__ == "__main__":
    sys.exit(main())
