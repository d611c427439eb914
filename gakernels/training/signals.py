"""SIGTERM and SIGINT end a run after the step under way, with a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TrainingStopped(SystemExit):
    """A run stopped because it was asked to.

    Uncaught it ends the process with the code that shells give a process ended by that signal: 143 for SIGTERM, 130
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
        """The handler: a second signal does what it always did."""
        self.number = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Signals to stop are noted while the block runs, in the main thread; elsewhere Python can't hear them."""
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
