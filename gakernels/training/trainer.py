"""The training loop: steps, log, evaluations, checkpoints, signals, on one or several processes."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import nn
from tqdm import tqdm

from gakernels.distributed import Parallel
from gakernels.errors import FormatError
from gakernels.model.window_losses import Loss
from gakernels.training.checkpoint import RunState, checkpoint_writer, load_checkpoint, newest_good
from gakernels.training.objective import Objective
from gakernels.training.run_log import RunLog, StepCost, peak_bytes, peak_tflops
from gakernels.training.sharding import local_part
from gakernels.training.step import SkippedSteps, StepResult, TrainingStep, culprit, random_kept
from gakernels.training.trainer_config import OUTER_SETTINGS, TrainerConfig

__all__ = ["Trainer", "TrainerConfig"]


class Trainer:
    """Trains parameters on an objective, in a folder that keeps the log and the checkpoints (docs/training.md).

    Args:
        config: how to optimise.
        parameters: what to train, by name.
        objective: see `Objective`; or a function that takes the number of a step, counted from 0, and returns the
            losses of its batch. Its result must depend only on that number (and seed, rank and number of processes), so
            that a resumed run equals an uninterrupted one.
        folder: receives `log.jsonl` and `checkpoints/`; None writes nothing.
        settings: what else the run depends on (data, seed, ...), in JSON types; a checkpoint is resumed only by a run
            with equal settings.
        progress: whether to show a progress bar.
        parallel: the processes; a single one by default.
        evaluate: returns the numbers of an evaluation, in JSON types; called on every process.
        cost: the work of a step, for the rates in the log.

    Attributes:
        step: takes one step by its number, see `TrainingStep`.

    Raises:
        InputError: there is nothing to train, or a pattern of learning_rate_factors matches nothing.
    """

    def __init__(
        self,
        config: TrainerConfig,
        parameters: Mapping[str, nn.Parameter],
        objective: Objective[Any] | Callable[[int], Mapping[str, Loss]],
        folder: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        progress: bool = True,
        parallel: Parallel | None = None,
        evaluate: Callable[[], Mapping[str, Any]] | None = None,
        cost: StepCost | None = None,
    ) -> None:
        self.config, self.parameters, self.folder = config, dict(parameters), folder
        self.parallel, self.evaluate, self.cost = parallel or Parallel(), evaluate, cost or StepCost()
        self.progress = progress and self._leads
        inner = {name: value for name, value in asdict(config).items() if name not in OUTER_SETTINGS}
        self.settings = {"trainer": inner, **(settings or {})}
        self.step = TrainingStep(config, self.parameters, objective, self.parallel)
        self._peak_tflops = config.peak_tflops or peak_tflops(self.step.device)
        self._forget()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over the parameters."""
        return self.step.optimizer

    @property
    def _leads(self) -> bool:
        """Whether this process writes the log and messages."""
        return self.parallel.ranks.rank == 0

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, from the newest good checkpoint of the folder if there is one.

        Returns:
            The lines of the log that this call added.

        Raises:
            InputError: loss_weights names a loss that the objective does not have, or a report's package is missing.
            FormatError: all checkpoints are damaged, or the newest belongs to a run with other settings.
            OSError: the log or a checkpoint could not be written.
            FloatingPointError: too many steps in a row were skipped, or a parameter is not finite.
            TrainingStopped: SIGTERM or SIGINT arrived; the current step is finished and in a checkpoint.
        """
        first = self._resume()
        log = RunLog(self.folder if self._leads else None, first, self.config.reports, self.settings)
        lines: list[dict[str, Any]] = []
        try:
            with (
                stop_requests() as request,
                random_kept(self.step.device),
                self._bar(first) as bar,
                checkpoint_writer(self.parallel) as self._checkpoints,
            ):
                clock = _Clock()
                for done in range(first + 1, self.config.steps + 1):
                    self._add(done, self.step(done - 1))
                    clock.steps += 1
                    bar.update()
                    if self._ends_line(done):
                        lines.append(self._line(done, clock))
                        log.write(lines[-1])
                        self._show(bar, lines[-1])
                        clock = _Clock()
                    stop = self._asked_to_stop(request)
                    self._save_if_due(done, bool(stop))
                    if stop and done < self.config.steps:
                        self._checkpoints.wait()  # before the message promises that the run can be resumed
                        raise self._stopped(stop, done)
        finally:
            log.close()
        return lines

    def _bar(self, first: int) -> tqdm[NoReturn]:
        return tqdm(
            total=self.config.steps, initial=first, desc=self.config.label, unit="step", disable=not self.progress
        )

    def _show(self, bar: tqdm[NoReturn], line: Mapping[str, Any]) -> None:
        shown = {name: f"{value:.3f}" for name, value in line["loss"].items()}
        if "tokens_per_second" in line:
            shown["tokens/s"] = f"{line['tokens_per_second']:,.0f}"
        if "mfu" in line:
            shown["MFU"] = f"{line['mfu']:.1%}"
        bar.set_postfix({**shown, "GB": f"{line['peak_bytes'] / 1e9:.1f}"})

    # Steps since the last line of the log

    def _forget(self) -> None:
        self._results: list[StepResult | list[float]] = []  # numbers if they come from a checkpoint
        self._skipped_here: list[int] = []
        self._skipped = SkippedSteps()
        self._is_due = False

    def _add(self, done: int, result: StepResult) -> None:
        self._results.append(result)
        self._skipped.add(done, result.bad)
        self._report_skipped(done, self._skipped.read())

    def _report_skipped(self, done: int, numbers: list[int]) -> None:
        """Report which steps were skipped and why; too many in a row end the run.

        Steps are numbered from 1 here, as in the log.
        """
        for number in numbers:
            self._skipped_here.append(number)
            *sums, norm, _ = _numbers(self._results[number - 1 - done])
            reason = culprit(dict(zip(self.step.names, sums, strict=False)), norm)
            if self._leads:
                tqdm.write(f"{self.config.label}: step {number} was skipped: {reason}", file=sys.stderr)
            if self._skipped.in_a_row >= self.config.most_skipped:
                raise self._diverged(number, reason)

    def _diverged(self, number: int, reason: str) -> FloatingPointError:
        count = self._skipped.in_a_row
        return FloatingPointError(
            f"training stopped: {count} steps in a row were skipped, and in step {number} {reason}; "
            "a lower learning rate may help"
        )

    def _ends_line(self, done: int) -> bool:
        return done == self.config.steps or _due(done, self.config.log_every) or self._evaluates(done)

    def _evaluates(self, done: int) -> bool:
        return self.evaluate is not None and _due(done, self.config.evaluate_every)

    def _line(self, done: int, clock: _Clock) -> dict[str, Any]:
        """The log line about the steps since the previous line; waits for the device."""
        rows = [_numbers(result) for result in self._results]
        self._report_skipped(done, self._skipped.read(all_of_them=True))
        seconds = clock.seconds_per_step()
        means = self._means([row for row in rows if not row[-1]])
        line: dict[str, Any] = {
            "step": done,
            "loss": means,
            "perplexity": {name: math.exp(min(mean, 700.0)) for name, mean in means.items()},
            "gradient_norm": next((row[-2] for row in reversed(rows) if not row[-1]), None),
            "learning_rate": self.step.learning_rate,
            "seconds_per_step": seconds,
            **self.cost.rates(seconds, self.parallel.ranks.world, self._peak_tflops),
            "peak_bytes": peak_bytes(self.step.device),
        }
        if self._skipped_here:
            line["skipped"] = self._skipped_here
        if self.evaluate is not None and self._evaluates(done):
            line["evaluation"] = dict(self.evaluate())
        self._results, self._skipped_here = [], []
        return line

    def _means(self, rows: list[list[float]]) -> dict[str, float]:
        """Mean of each loss over the tokens of all good steps; a loss without tokens is left out."""
        if not rows:
            return {}
        sums = [sum(column) for column in zip(*rows, strict=True)]
        totals = zip(self.step.names, sums, sums[len(self.step.names) :], strict=False)
        return {name: total / tokens for name, total, tokens in totals if tokens}

    # Checkpoints

    def _state(self) -> RunState:
        tensors = {f"guard/{name}": tensor for name, tensor in self.step.guard.tensors().items()}
        return RunState(self.parameters, self.optimizer, tensors, self.settings)

    def _save_if_due(self, done: int, stops: bool) -> None:
        """Save a checkpoint if one is due, but not after a bad step, when the parameters may be bad already."""
        last = done == self.config.steps
        self._is_due |= last or stops or _due(done, self.config.checkpoint_every)
        if not self._is_due:
            return
        self._report_skipped(done, self._skipped.read(all_of_them=True))
        if last and self._skipped.in_a_row > 1:
            raise self._diverged(done, "the run ended")
        if last or not self._skipped.in_a_row:
            self._save(done)
            self._is_due = False

    def _save(self, done: int) -> None:
        finite = torch.stack([local_part(parameter).isfinite().all() for parameter in self.parameters.values()])
        broken = self.parallel.sum((~finite).long()).tolist()
        for name, count in zip(self.parameters, broken, strict=True):
            if count:
                raise FloatingPointError(f"training stopped: {name} is not finite after step {done}")
        if self.folder:
            notes = {
                "names": list(self.step.names),
                "results": [_numbers(result) for result in self._results],
                "skipped": self._skipped_here,
            }
            folder = self.folder / "checkpoints"
            self._checkpoints.save(folder, done, self._state(), notes, self.config.keep_checkpoints)

    def _resume(self) -> int:
        """Load the newest good checkpoint and return the number of steps taken."""
        self._forget()
        if self.folder is None:
            return 0
        path = self._newest()
        if path is None:
            return 0
        step, notes = load_checkpoint(path, self._state(), self.parallel)
        self.step.names = tuple(notes["names"])
        self._results, self._skipped_here = notes["results"], notes["skipped"]
        return step

    def _newest(self) -> Path | None:
        """The newest good checkpoint, as the first process finds it."""
        assert self.folder
        path: Path | None = None
        damage: list[str] = []
        refusal: str | None = None
        if self._leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                path, damage = newest_good(self.folder / "checkpoints", self.settings)
            except FormatError as error:
                refusal = str(error)
            for text in damage:
                tqdm.write(f"{self.config.label}: {text}; resuming from an earlier one", file=sys.stderr)
        path, refusal = self.parallel.broadcast((path, refusal))
        if refusal:
            raise FormatError(refusal)
        return path

    # Signals

    def _asked_to_stop(self, request: StopRequest) -> int:
        """The number of a signal that reached any of the processes; 0 for none."""
        if self.parallel.ranks.world == 1:
            return request.number
        numbers = (signal.SIGTERM, signal.SIGINT)
        counts = self.parallel.sum(torch.tensor([request.number == number for number in numbers]).long()).tolist()
        return next((int(number) for number, count in zip(numbers, counts, strict=True) if count), 0)

    def _stopped(self, number: int, done: int) -> TrainingStopped:
        where = f"; the same command resumes from {self.folder / 'checkpoints'}" if self.folder else ""
        message = f"{self.config.label}: stopped by {signal.Signals(number).name} after step {done}{where}"
        if self._leads:
            tqdm.write(message, file=sys.stderr)
        return TrainingStopped(number, message)


class _Clock:
    """The time since the last line of the log."""

    def __init__(self) -> None:
        self.steps = 0
        self._started = time.perf_counter()

    def seconds_per_step(self) -> float:
        return (time.perf_counter() - self._started) / max(1, self.steps)


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _numbers(result: StepResult | list[float]) -> list[float]:
    return result if isinstance(result, list) else result.numbers()


class TrainingStopped(SystemExit):
    """A signal stopped the run.

    Uncaught, it ends the process with the exit code that shells report for that signal: 143 for SIGTERM, 130
    for SIGINT.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """The signal that came, if any."""

    number: int = 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler; a second signal has its usual effect."""
        self.number = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note signals to stop while the block runs; only in the main thread, where Python receives signals."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
