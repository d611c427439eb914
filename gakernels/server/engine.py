"""Engine: the single thread that uses the model. Between decoding steps it does other work, one piece at a time."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from gakernels.generation.scheduler import Generation, Scheduler
from gakernels.model import GenerativeAdapter
from gakernels.server.settings import Limits

T = TypeVar("T")
logger = logging.getLogger(__name__)
_WAIT_FOR_ADAPTERS = 0.002  # seconds


class BusyError(RuntimeError):
    """The queue is full; try again later."""


@dataclass
class _Work(Generic[T]):
    """Work in pieces: the result is the last value that the iterator yields; it must yield at least one."""

    pieces: Iterator[T]
    future: Future[T] = field(default_factory=Future)
    last: list[T] = field(default_factory=list)

    def advance(self) -> bool:
        """Do one piece; returns whether it was the last."""
        try:
            self.last = [next(self.pieces)]
            return False
        except StopIteration:
            self.future.set_result(self.last[0])
        except Exception as error:  # for those who wait for the result
            self.future.set_exception(error)
        return True


class Engine:
    """Runs generations and other work on a model in a thread of its own.

    Each turn is one step of decoding for all rows and one piece of other work (a pass over a part of a context), so
    neither waits long for the other.

    Args:
        model: only this engine may use it for forward passes until `close`.
        limits: on rows, the key-value cache, and the queue.
        threads: of the CPU operations; None for PyTorch's default.
    """

    def __init__(self, model: GenerativeAdapter, limits: Limits, threads: int | None = None) -> None:
        self.scheduler = Scheduler(model, limits.rows, max_cache_tokens=limits.cache_tokens)
        self._max_waiting, self._threads = limits.waiting, threads
        self._inbox: queue.SimpleQueue[Generation | _Work[Any] | None] = queue.SimpleQueue()
        self._work: deque[_Work[Any]] = deque()
        self._open, self._lock, self._stopping = 0, threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="gakernels-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """The number of generations that wait for a row, and of other work."""
        return len(self.scheduler.waiting) + len(self._work) + self._inbox.qsize()

    @property
    def running(self) -> int:
        """The number of rows in the batch."""
        return len(self.scheduler.running)

    def submit(self, generation: Generation) -> None:
        """Continue a prompt; its pieces arrive through its own callback.

        Raises:
            BusyError: too much is waiting.
        """
        generation.on_end = self._release
        self._admit(generation)

    def work(self, make: Callable[[], Iterator[T]]) -> Future[T]:
        """Exhaust an iterator in the engine's thread; the result is the last value that it yields.

        Raises:
            BusyError: too much is waiting.
        """

        def pieces() -> Iterator[T]:
            yield from make()

        work = _Work(pieces())
        work.future.add_done_callback(lambda _: self._release())
        self._admit(work)
        return work.future

    def close(self) -> None:
        """End the thread; unfinished work is cancelled."""
        with self._lock:
            self._stopping = True
        self._inbox.put(None)
        self._thread.join()

    def _admit(self, item: Generation | _Work[Any]) -> None:
        with self._lock:
            if self._stopping:
                raise BusyError("the server is shutting down")
            if self._open >= self._max_waiting:
                raise BusyError(f"{self._open} requests are waiting or running already; try again later")
            self._open += 1
            self._inbox.put(item)  # under the lock: whatever is accepted comes before the end

    def _release(self) -> None:
        with self._lock:
            self._open -= 1

    # The thread

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            while not self._stopping:
                self._turn()
        finally:  # even after a defect: nobody must wait for an answer that never comes
            with self._lock:
                self._stopping = True
            self._cancel_all()

    def _turn(self) -> None:
        self._receive()
        tokens = self._decode()
        if self._work and self._work[0].advance():
            self._work.popleft()
        elif self._work:
            self._work.rotate(-1)
        if not tokens and not self._work and self.scheduler.waiting and not self.scheduler.running:
            self._receive(_WAIT_FOR_ADAPTERS)  # nothing to do until one is loaded

    def _receive(self, timeout: float | None = None) -> None:
        """Take what has arrived; wait for it if there is nothing else to do."""
        block = timeout is not None or (self.scheduler.idle and not self._work)
        while not self._stopping:
            try:
                item = self._inbox.get(block, timeout)
            except queue.Empty:
                return
            block = False
            self._sort_in(item)

    def _sort_in(self, item: Generation | _Work[Any] | None) -> None:
        if isinstance(item, Generation):
            self.scheduler.submit(item)
        elif item is not None and item.future.set_running_or_notify_cancel():
            self._work.append(item)

    def _decode(self) -> int:
        if self.scheduler.idle:
            return 0
        try:
            return self.scheduler.step()
        except Exception:  # the rows have the error; the engine continues
            logger.exception("a step of decoding failed")
            return 0

    def _cancel_all(self) -> None:
        while not self._inbox.empty():
            self._sort_in(self._inbox.get())
        error = BusyError("the server is shutting down")
        self.scheduler.fail_all(error)
        for work in self._work:
            work.future.set_exception(error)
