"""What the log of a training run says about each quantity, step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gakernels.errors import InputError
from gakernels.training.run_log import LOG_FILE, flat_numbers, read_log

CONTROL_FOLDER = "static_lora"


@dataclass(frozen=True)
class Series:
    """Values (n,) of one quantity after steps (n,), in the order of the steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def smoothed(self, share: float = 0.05) -> "Series":
        """An exponential moving average, unbiased at the start, whose memory is that share of the steps."""
        memory = max(1.0, share * (self.steps[-1] - self.steps[0]))
        mean = weight = 0.0
        values, before = [], self.steps[0]
        for step, value in zip(self.steps, self.values, strict=True):
            kept = 0.5 ** ((step - before) / (memory / 2))
            mean, weight, before = kept * mean + value, kept * weight + 1, step
            values.append(mean / weight)
        return Series(self.steps, tuple(values))


@dataclass(frozen=True)
class RunSeries:
    """A run.

    Attributes:
        name: for the legend.
        series: by the name of the quantity, as `flat_numbers` gives it: `loss/completion`, `learning_rate`, ...
        skipped: the steps that the guard skipped.
        is_control: whether it is the static LoRA of the run before it.
    """

    name: str
    series: Mapping[str, Series]
    skipped: tuple[int, ...] = ()
    is_control: bool = False


def read_runs(paths: Sequence[Path]) -> list[RunSeries]:
    """The runs of some folders, each followed by its static LoRA where there is one; also of log files themselves.

    Raises:
        InputError: there is no log, or no whole line in it.
    """
    runs = []
    for path, name in zip(paths, _names(paths), strict=True):
        runs.append(_read_run(path / LOG_FILE if path.is_dir() else path, name))
        control = path / CONTROL_FOLDER / LOG_FILE
        if control.is_file() and read_log(control):
            runs.append(_read_run(control, f"{name}, static LoRA", is_control=True))
    return runs


def _read_run(path: Path, name: str, is_control: bool = False) -> RunSeries:
    lines = _by_step(read_log(path))
    if not lines:
        raise InputError(f"{path} has no whole line yet")
    points: dict[str, list[tuple[int, float]]] = {}
    for step, line in lines.items():
        for quantity, value in flat_numbers(line).items():
            points.setdefault(quantity, []).append((step, value))
    series = {quantity: Series(*zip(*found, strict=True)) for quantity, found in points.items()}
    skipped = tuple(step for line in lines.values() for step in line.get("skipped", ()))
    return RunSeries(name, series, skipped, is_control)


def _by_step(lines: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The lines by their step. What stands twice was written again by a run that went on from an earlier step."""
    found: dict[int, Mapping[str, Any]] = {}
    for line in lines:
        step = int(line["step"])
        found = {earlier: kept for earlier, kept in found.items() if earlier < step} if step in found else found
        found[step] = line
    return dict(sorted(found.items()))


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    places = [(path if path.is_dir() else path.parent).resolve().parts for path in paths]
    for length in range(1, max(map(len, places), default=1) + 1):
        names = ["/".join(parts[-length:]) for parts in places]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(parts)} ({number})" for number, parts in enumerate(places, 1)]
