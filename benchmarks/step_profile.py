"""One training step under PyTorch's profiler: kernels by time, launches, and where the host waits for the GPU.

    python -m benchmarks.step_profile --preset smollm2-135m --provider trainer --json FILE

On a CPU there are no launches and no waits; PyTorch's operators are listed as kernels.
"""

import argparse
import collections
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import synchronize
from benchmarks.presets import PRESETS, Preset, make_model
from benchmarks.rows import ROOT, environment
from benchmarks.step_providers import PROVIDERS, make_trainee
from benchmarks.train_step import StepRunner, StepSettings, device_batch
from gakernels.files import write_text

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
SHOWN = 40  # lines of the table; the file has all of them
OURS = ("gakernels", "transformers", "benchmarks")  # packages by which a place is named


def profile_step(preset: Preset, provider: str, device: torch.device) -> dict[str, Any]:
    """The report on one step, after two to warm up.

    Returns:
        `wall_s` (mean of two unprofiled steps), `segment_tokens_per_s`, `busy_ms` (all kernels together), `launches`,
        `kernels` ([ms, calls, name] by time) and `waits` (times by place, innermost first).
    """
    model = make_model(preset, device, 0)
    runner = StepRunner(make_trainee(provider, model, preset), model, preset, device)
    batch = device_batch(StepSettings(preset, (provider,), device), 0)

    def step() -> None:
        runner.step(batch)
        synchronize(device)

    for _ in range(2):
        step()
    started = time.perf_counter()
    for _ in range(2):
        step()
    wall = (time.perf_counter() - started) / 2
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
    kernels, launches = _kernels(profiler, device)
    return {
        "wall_s": wall,
        "segment_tokens_per_s": preset.segment_tokens / wall,
        "busy_ms": sum(row[0] for row in kernels),
        "launches": launches,
        "kernels": kernels,
        "waits": _waits(lambda: runner.step(batch), device),
    }


def _kernels(profiler: Any, device: torch.device) -> tuple[list[tuple[float, int, str]], int]:
    """[ms, calls, name] by time, and the number of launches."""
    averages = profiler.key_averages()
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    there = [a for a in averages if str(a.device_type).endswith(device.type.upper())]
    rows = sorted(((getattr(a, time_of) / 1e3, a.count, a.key[:160]) for a in there), reverse=True)
    return rows, sum(a.count for a in averages if a.key in LAUNCHES)


def _waits(step: Callable[[], None], device: torch.device) -> dict[str, int]:
    """How often the host waits for the device, by the three innermost lines of OURS."""
    places: collections.Counter[str] = collections.Counter()
    if device.type == "cuda":
        with _each_warning(lambda: places.update([place("step_profile")])):
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return dict(places.most_common())


@contextmanager
def _each_warning(seen: Callable[[], object]) -> Iterator[None]:
    """Call a function at each warning about a synchronisation while the block runs."""

    def show(message: object, *_: object) -> None:
        if "synchronizing" in str(message):
            seen()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with patch.object(warnings, "showwarning", show):
            yield


def place(*left_out: str) -> str:
    """Where the caller is called, by the three innermost lines of OURS, without those of files named `left_out`."""
    frames = [frame for frame in traceback.extract_stack() if any(f"/{name}/" in frame.filename for name in OURS)]
    lines = [
        f"{_short(frame.filename)}:{frame.lineno}" for frame in frames if Path(frame.filename).stem not in left_out
    ]
    return " < ".join(reversed(lines[-3:]))


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f"{path.parent.name}/{path.name}"


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"step {report['wall_s'] * 1e3:.1f} ms, {report['segment_tokens_per_s']:.0f} tokens/s; "
        f"device busy {report['busy_ms']:.1f} ms, {report['launches']} launches",
        *(f"{ms:9.2f} ms {calls:6d}  {name}" for ms, calls, name in report["kernels"][:SHOWN]),
        f"the host waits {sum(report['waits'].values())} times",
        *(f"{count:6d}  {place}" for place, count in report["waits"].items()),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command. The report is added to the file, under `<preset> <provider>`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--preset", default="smollm2-135m", choices=PRESETS)
    parser.add_argument("--provider", default="trainer", choices=PROVIDERS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file of the reports")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    report = profile_step(PRESETS[options.preset], options.provider, device)
    print(f"{options.preset}, {options.provider}: {table(report)}")
    if options.json:
        reports = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
        reports[f"{options.preset} {options.provider}"] = {**report, "environment": vars(environment(device))}
        write_text(options.json, json.dumps(reports, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
