"""Which contexts brought by requests are in use, and which of the others may be removed for new ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import count

from gakernels.server.context_store import Context


class TextContexts:
    """Counts the requests that use a context, and remembers the order of use. Belongs to one event loop."""

    def __init__(self) -> None:
        self._holders: Counter[str] = Counter()
        self._used: dict[str, int] = {}
        self._clock = count(1)

    def hold(self, identifier: str) -> None:
        """A request uses the context, which therefore stays."""
        self._holders[identifier] += 1
        self._used[identifier] = next(self._clock)

    def release(self, identifier: str) -> None:
        """It does not need it any more."""
        self._holders[identifier] -= 1
        if not self._holders[identifier]:
            del self._holders[identifier]

    def forget(self, identifier: str) -> None:
        """The context is gone."""
        self._used.pop(identifier, None)

    def dispensable(self, contexts: Iterable[Context]) -> Context | None:
        """The least recently used of these contexts that can be made again from a request; None if there is none."""
        idle = [context for context in contexts if context.fixed and context.id not in self._holders]
        return min(idle, key=lambda context: (self._used.get(context.id, 0), context.created), default=None)
