"""Find the launch settings that are fastest on this GPU, and store them.

    python -m benchmarks.tune --preset mistral-7b --dtype bfloat16 --store FILE

Starting from the settings in force, each number of each kernel is halved and doubled (warps and pipeline stages too) as
long as that makes the operation, forward and backward together, faster by more than a measurement scatters. A candidate
that does not compile, does not fit the GPU or is wrong is passed over. Without --store the table of this GPU in
`gakernels/ops/tuned/` is written; GAKERNELS_TUNED=FILE puts another one in force.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.measure import dtype_name, time_call
from benchmarks.operations import PRESETS, Operation, operations, oracle_error, seeded, with_leaves
from gakernels.files import write_text
from gakernels.ops import tuned
from gakernels.ops.gpus import slug

Settings = dict[str, int]
GAIN = 0.98  # of the time before: less is scatter


def tune(kernel: str, start: Settings, seconds: Callable[[Settings], float | None]) -> Settings:
    """Coordinate descent over the settings of one kernel.

    Args:
        kernel: its name, for the progress that is printed.
        start: the settings to begin with.
        seconds: the time of the operation with some settings, None where they can't be used.

    Returns:
        The best settings found; `start` where nothing else is clearly faster.
    """
    best, best_time = start, seconds(start)
    tried = {json.dumps(start, sort_keys=True)}
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best):
            key = json.dumps(candidate, sort_keys=True)
            if key in tried:
                continue
            tried.add(key)
            time = seconds(candidate)
            print(f"{kernel} {candidate}: {'not usable' if time is None else f'{1e6 * time:.1f} us'}", flush=True)
            if time is not None and (best_time is None or time < GAIN * best_time):
                best, best_time, improved = candidate, time, True
                break
    return best


def neighbours(settings: Settings) -> Iterator[Settings]:
    """Settings that differ in one number: blocks and warps by a factor of two, stages and groups by one step."""
    for name, value in settings.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        lowest = {"num_stages": 1, "num_warps": 1}.get(name, 16 if name.startswith("BLOCK") else 1)
        highest = {"num_stages": 6, "num_warps": 16}.get(name, 512)
        yield from ({**settings, name: step} for step in steps if lowest <= step <= highest)


@dataclass(frozen=True)
class Launch:
    """What a kernel asks the tables for, and what it is given."""

    kernel: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    settings: tuple[tuple[str, int], ...]

    def entry(self, settings: Settings) -> dict[str, Any]:
        """An entry of a table for just this."""
        return {"dtypes": [self.dtype], "sizes": dict(self.sizes), "settings": settings}


def launches(run: Callable[[], object]) -> list[Launch]:
    """What the kernels that a call launches ask for, each once."""
    asked: dict[Launch, None] = {}
    plain = tuned.settings

    def record(kernel: str, device: torch.device, dtype: torch.dtype, **sizes: int) -> Settings:
        given = plain(kernel, device, dtype, **sizes)
        asked[Launch(kernel, dtype_name(dtype), tuple(sizes.items()), tuple(given.items()))] = None
        return given

    with patch.object(tuned, "settings", record):
        run()
    return list(asked)


@contextmanager
def in_force(launch: Launch, settings: Settings, path: Path) -> Iterator[None]:
    """Other settings of one kernel while the block runs, in front of what the table at `path` holds."""
    kernels = json.loads(path.read_text())["kernels"] if path.exists() else {}
    entries = [launch.entry(settings), *kernels.get(launch.kernel, [])]
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.json"
        table.write_text(json.dumps({"kernels": {**kernels, launch.kernel: entries}}))
        with patch.dict(os.environ, {tuned.ENVIRONMENT_VARIABLE: str(table)}):
            yield


def measure(operation: Operation) -> float | None:
    """Seconds of forward and backward with the Triton kernels, or None where they fail or are wrong."""
    implementation = operation.implementation("triton")
    eager = operation.implementation("eager")
    try:
        if oracle_error(operation, "backward", implementation) > 4 * oracle_error(operation, "backward", eager) + 1e-6:
            return None
        arguments, leaves = with_leaves(operation, operation.draw(seeded(operation.device, 1)))

        def run(_: Any) -> None:
            returned = implementation(*arguments)
            outputs, gradients = operation.upstream(returned, torch.ones_like(operation.defined(returned)))
            torch.autograd.grad(outputs, leaves, gradients)

        return time_call(run, lambda _: None, operation.device).p50_ms / 1e3
    except Exception as error:  # settings that do not fit raise whatever the compiler or the driver raises
        print(f"  {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
        return None


def store(path: Path, gpu: str, launch: Launch, settings: Settings) -> None:
    """Put settings in front of what a table holds for a kernel; the rest of it stays."""
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


def tune_operation(operation: Operation, path: Path, gpu: str) -> None:
    """One kernel after the other, each stored as soon as it is found and in force for the ones after it."""
    for launch in launches(lambda: measure(operation)):

        def seconds(settings: Settings, launch: Launch = launch) -> float | None:
            with in_force(launch, settings, path):
                return measure(operation)

        store(path, gpu, launch, tune(launch.kernel, dict(launch.settings), seconds))
        print(f"{launch.kernel}: stored in {path}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--preset", default="mistral-7b", choices=PRESETS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--store", type=Path, help="the table to write")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tuning needs a GPU, and there is none that this torch can use", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    gpu = torch.cuda.get_device_name(device)
    path = options.store or tuned.FOLDER / f"{slug(gpu)}.json"
    for operation in operations(options.preset, device, getattr(torch, options.dtype)):
        print(f"{operation.name} {operation.shape}", flush=True)
        tune_operation(operation, path, gpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
