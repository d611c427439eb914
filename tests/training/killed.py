"""Runs in a process of their own, for the tests that kill them."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from random import Random

import processes
import regression
import torch
from forked import own_progress_lock

# One process imports what takes long, and those that are killed are forked from it.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["gakernels.training.trainer", "transformers.models.llama.modeling_llama"])


def train_regression(folder: Path, seed: int, steps: int = 100) -> None:
    """Many steps and checkpoints of a moment each."""
    problem = regression.Problem(seed)
    regression.make_trainer(problem, folder, steps=steps, log_every=7, checkpoint_every=4).run()


def train_longer(folder: Path, seed: int) -> None:
    """The same with more of them."""
    train_regression(folder, seed, 600)


def train_generator(folder: Path, seed: int) -> None:
    """A tiny model with its generators."""
    processes.make_trainer(seed, folder, steps=60, log_every=1, checkpoint_every=2).run()


def _run(train: Callable[[Path, int], None], folder: Path, seed: int, begun: Event) -> None:
    torch.set_num_threads(1)
    own_progress_lock()
    begun.set()
    train(folder, seed)


Kill = Callable[[Path, BaseProcess], None]  # returns when it is time


def run(train: Callable[[Path, int], None], folder: Path, seed: int, kill: Kill | None = None) -> int:
    """Train in another process until it ends or is killed; gives its exit code, -9 for killed."""
    begun = _server.Event()
    process = _server.Process(target=_run, args=(train, folder, seed, begun))
    process.start()
    begun.wait()
    if kill:
        kill(folder, process)
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def after(random: Random, longest: float) -> Kill:
    """A random moment."""
    return lambda folder, process: process.join(random.uniform(0, longest))


def while_writing(random: Random) -> Kill:
    """A moment at which one of the next three checkpoints is written."""

    def wait(folder: Path, process: BaseProcess) -> None:
        seen: set[str] = set()
        wanted = random.randint(1, 3)
        while len(seen) < wanted and process.is_alive():
            seen |= {path.name for path in (folder / "checkpoints").glob(".step-*.tmp")}
        time.sleep(random.uniform(0, 0.004))

    return wait
