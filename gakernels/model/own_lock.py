"""A lock that does not prevent its owner from being copied or pickled."""

import threading
from typing import Any


class OwnLock:
    """A lock for a `with` block; a copy of the object that holds it gets a new, free lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __repr__(self) -> str:
        return "OwnLock()"

    def __reduce__(self) -> Any:
        return type(self), ()
