"""The quantities in the logs of training runs, step by step, and their curves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gakernels.errors import InputError
from gakernels.files import replacing
from gakernels.training.run_log import LOG_FILE, flat_numbers, read_log

CONTROL_FOLDER = "static_lora"


@dataclass(frozen=True)
class Series:
    """Values (n,) of one quantity after steps (n,), in the order of the steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def smoothed(self, share: float = 0.05) -> "Series":
        """An exponential moving average, unbiased at the start, with a memory of that share of the steps."""
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
    """The series of one run.

    Attributes:
        name: for the legend.
        series: by name of the quantity, as in `flat_numbers`: `loss/completion`, `learning_rate`, ...
        skipped: the steps that the guard skipped.
        is_control: whether it is the static LoRA of the run before it.
    """

    name: str
    series: Mapping[str, Series]
    skipped: tuple[int, ...] = ()
    is_control: bool = False


def read_runs(paths: Sequence[Path]) -> list[RunSeries]:
    """The runs of some folders, each followed by its static LoRA if there is one; paths may also be log files.

    Raises:
        InputError: there is no log, or it has no complete line.
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
    """The lines by step. Of two lines for a step the later counts: the run was resumed from an earlier step."""
    found: dict[int, Mapping[str, Any]] = {}
    for line in lines:
        step = int(line["step"])
        found = {earlier: kept for earlier, kept in found.items() if earlier < step} if step in found else found
        found[step] = line
    return dict(sorted(found.items()))


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that distinguish them."""
    places = [(path if path.is_dir() else path.parent).resolve().parts for path in paths]
    for length in range(1, max(map(len, places), default=1) + 1):
        names = ["/".join(parts[-length:]) for parts in places]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(parts)} ({number})" for number, parts in enumerate(places, 1)]


SUFFIXES = (".png", ".svg", ".pdf")
TASKS = ("reconstruction", "completion")
ADAPTERS = {"own": "-", "other": "--", "empty": "-.", "none": ":"}  # the adapters of a report, and their line styles
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito's
GRID = {"color": "#dddddd", "linewidth": 0.6}


def plot_runs(runs: Sequence[RunSeries], output: Path) -> None:
    """Draw runs into a file, one panel per quantity, one colour per run (its static LoRA lighter).

    Args:
        runs: as `read_runs` returns them.
        output: ends in .png, .svg or .pdf.

    Raises:
        InputError: the output has another suffix, or matplotlib is not installed.
        OSError: it can't be written.
    """
    if output.suffix not in SUFFIXES:
        raise InputError(f"output must end in {', '.join(SUFFIXES)}, but it is {output}")
    figure = draw_runs(runs)
    with replacing(output) as temporary:
        figure.savefig(temporary, format=output.suffix[1:], dpi=150)


def draw_runs(runs: Sequence[RunSeries]) -> Any:
    """The matplotlib figure of `plot_runs`.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need the package matplotlib: pip install 'gakernels[plots]'") from error
    panels = _panels(runs)
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.1 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axis, (title, draw) in zip(axes, panels, strict=False):
        draw(axis)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(True, **GRID)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3), fontsize=9, frameon=False)
    return figure


Panel = tuple[str, Callable[[Any], None]]


def _panels(runs: Sequence[RunSeries]) -> list[Panel]:
    """Title and drawing function of each panel for which some run has values."""
    quantities = list(dict.fromkeys(name for run in runs for name in run.series))
    losses = [name for name in quantities if name.startswith("loss/")]
    panels: list[Panel] = [
        (f"{name.removeprefix('loss/')} loss, nats per token (pale: as logged)", _losses(runs, name)) for name in losses
    ]
    for task in TASKS:
        if any(name.startswith(f"evaluation/{task}/perplexity/") for name in quantities):
            panels.append((f"held-out {task} perplexity", _perplexities(runs, task)))
    for name, title, log in (
        ("learning_rate", "learning rate", False),
        ("gradient_norm", "gradient norm", True),
        ("tokens_per_second", "tokens a second", False),
    ):
        if name in quantities:
            panels.append((title, _lines(runs, name, log)))
    return panels


def _losses(runs: Sequence[RunSeries], name: str) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        for run, style in _styled(runs):
            found = run.series.get(name)
            if found is None:
                continue
            axis.plot(found.steps, found.values, **{**style, "linewidth": 0.8, "alpha": 0.3})
            smooth = found.smoothed()
            axis.plot(smooth.steps, smooth.values, label=run.name, **style)
            for step in run.skipped:
                axis.axvline(step, color=style["color"], linewidth=0.6, linestyle=":")
        axis.set_ylim(*_range([run.series[name] for run in runs if name in run.series]))

    return draw


def _range(losses: Sequence[Series]) -> tuple[float, float]:
    """From a little below the smallest value to a little above nearly all: single spikes are cut off."""
    values = sorted(value for found in losses for value in found.values)
    low, high = values[0], values[min(len(values) - 1, int(0.99 * len(values)))]
    high = max(high, max(found.values[0] for found in losses))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _perplexities(runs: Sequence[RunSeries], task: str) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        drawn = []
        for run, style in _styled(runs):
            for adapter, line in ADAPTERS.items():
                found = run.series.get(f"evaluation/{task}/perplexity/{adapter}")
                if found is not None:
                    axis.plot(found.steps, found.values, marker=".", **{**style, "linestyle": line})
                    drawn.append(adapter)
        axis.set_yscale("log")
        _plain_ticks(axis)
        lines = [
            axis.plot([], [], color="#555555", linestyle=line, label=adapter)[0]
            for adapter, line in ADAPTERS.items()
            if adapter in drawn
        ]
        # Next to the title: no corner is sure to be free.
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.0, "frameon": False}
        spacing = {"fontsize": 7.5, "columnspacing": 0.8, "handlelength": 1.7, "handletextpad": 0.4}
        axis.legend(handles=lines, ncols=len(lines), **place, **spacing)

    return draw


def _plain_ticks(axis: Any) -> None:
    """Label ticks 12 and 150 rather than as powers, even if a logarithmic axis covers less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _lines(runs: Sequence[RunSeries], name: str, log: bool) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        for run, style in _styled(runs):
            found = run.series.get(name)
            if found is not None:
                axis.plot(found.steps, found.values, label=run.name, **{**style, "linewidth": 1.0})
        if log:
            axis.set_yscale("log")
            _plain_ticks(axis)
        else:
            axis.set_ylim(bottom=0)

    return draw


def _styled(runs: Sequence[RunSeries]) -> list[tuple[RunSeries, dict[str, Any]]]:
    """Each run with its line style."""
    styled: list[tuple[RunSeries, dict[str, Any]]] = []
    number = -1
    for run in runs:
        number += not run.is_control
        style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.6, "linestyle": "-"}
        styled.append((run, {**style, "linestyle": "--", "linewidth": 1.2} if run.is_control else style))
    return styled
