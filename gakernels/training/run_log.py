"""The log of a run: losses, speed and memory as JSON lines, optionally also to TensorBoard or Weights & Biases."""

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from gakernels.errors import InputError
from gakernels.files import append_line, write_text

LOG_FILE = "log.jsonl"


class LogReport(Protocol):
    """A destination for the numbers of a run in addition to the log."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a line, with names like `loss/completion`."""
        ...

    def close(self) -> None:
        """Flush everything."""
        ...


class RunLog:
    """Appends lines to `log.jsonl` in a folder and passes their numbers to the reports.

    Args:
        folder: of the run; None writes nothing.
        step: the lines after it are dropped: an interrupted run wrote them, and the resumed one will write them again.
        reports: names from REPORTS.
        settings: of the run, shown by Weights & Biases.

    Raises:
        InputError: the package of a report is not installed.
        OSError: the log could not be written.
    """

    def __init__(
        self, folder: Path | None, step: int, reports: Sequence[str] = (), settings: Mapping[str, Any] | None = None
    ) -> None:
        self._path = folder / LOG_FILE if folder else None
        if self._path:
            _cut(self._path, step)
        self._reports = [REPORTS[name](folder, step, settings or {}) for name in reports] if folder else []

    def write(self, line: Mapping[str, Any]) -> None:
        """Write one line; it is on disk when this returns."""
        if self._path:
            append_line(self._path, json.dumps(finite(line), allow_nan=False))
        for report in self._reports:
            report.write(line["step"], flat_numbers(line))

    def close(self) -> None:
        """End the reports."""
        for report in self._reports:
            report.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a line that was cut off during writing is left out.

    Raises:
        InputError: there is no such file.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if math.isfinite(_step_of(line))]


def flat_numbers(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line by name: {"loss": {"completion": 2.0}} gives `loss/completion`."""
    numbers: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            numbers |= flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and prefix + name != "step":
            numbers[prefix + name] = value
    return numbers


def finite(value: Any) -> Any:
    """JSON types with None in place of infinity and NaN, which are not JSON."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases that a resumed run continues; WANDB_PROJECT, WANDB_MODE, ... configure it."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        name = folder / "wandb-id"
        if step == 0 or not name.is_file():
            write_text(name, os.urandom(6).hex())
        run_id = name.read_text(encoding="utf-8")
        self._run: Any = wandb.init(dir=str(folder), id=run_id, resume="allow", config=dict(settings))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


REPORTS: dict[str, Callable[..., LogReport]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def _missing(package: str) -> InputError:
    return InputError(f"reports: {package!r} needs the package {package}, which is not installed")


def _cut(path: Path, step: int) -> None:
    """Drop the lines after a step, and a line that was cut off during writing."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = "".join(line + "\n" for line in lines if _step_of(line) <= step)
    if kept != path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, kept)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return math.inf


# Dense bfloat16 with float32 sums, from the vendors' data sheets; keyed by part of PyTorch's device name, longer first.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H200": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
}


@dataclass(frozen=True)
class StepCost:
    """The work of an optimizer step over all processes; an average if steps differ. 0: unknown.

    Attributes:
        tokens: segment tokens (for instruction tuning those of contexts and conversations).
        flops: floating-point operations, forward and backward.
    """

    tokens: float = 0.0
    flops: float = 0.0

    def rates(self, seconds: float, devices: int, peak_tflops: float | None) -> dict[str, float]:
        """`tokens_per_second` and `mfu`, if known, of a step that took so long on so many devices."""
        rates = {"tokens_per_second": self.tokens / seconds} if self.tokens else {}
        if self.flops and peak_tflops:
            rates["mfu"] = self.flops / seconds / (peak_tflops * 1e12 * devices)
        return rates


def peak_tflops(device: torch.device) -> float | None:
    """The peak of a GPU in TFLOP/s from its name; None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_bytes(device: torch.device) -> int:
    """The peak memory of this process: of tensors on a GPU, of everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
