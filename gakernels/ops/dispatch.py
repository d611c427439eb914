"""One rule that picks the implementation of an operation.

`GAKERNELS_BACKEND` forces a backend, and is an error where that one can't run. Otherwise a hand-written kernel is the
default only where a committed measurement on that kind of GPU shows it correct and faster; there is none so far, so the
default is `eager` everywhere.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gakernels.errors import BackendError

BACKENDS = ("reference", "eager", "triton", "cuda")
ENVIRONMENT_VARIABLE = "GAKERNELS_BACKEND"


@dataclass(frozen=True)
class Choice:
    """The backend that runs an operation, and why."""

    backend: str
    reason: str


def choose(operation: str, available: Mapping[str, Callable[..., Any]]) -> Choice:
    """Pick the backend of one operation.

    Args:
        operation: name of the operation, for messages.
        available: its implementations by backend name.

    Raises:
        BackendError: the environment variable names no backend, or one that this operation does not have here.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not forced:
        return Choice("eager", "default: no committed measurement shows a hand-written kernel faster here")
    if forced not in BACKENDS:
        raise BackendError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)}, but it is {forced!r}")
    if forced not in available:
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}={forced}, but {operation} has no {forced} implementation in this installation "
            f"(it has {', '.join(available)})"
        )
    return Choice(forced, f"forced by {ENVIRONMENT_VARIABLE}")
