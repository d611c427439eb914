"""Metrics in the text format of Prometheus (version 0.0.4), without a library for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number by labels that only grows."""

    kind = "counter"

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self._values: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float = 1, **labels: str) -> None:
        """Add to the number with these labels."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def value(self, **labels: str) -> float:
        """The number with these labels."""
        return self._values.get(tuple(sorted(labels.items())), 0)

    def lines(self) -> list[str]:
        """One a label set."""
        with self._lock:
            return [_line(self.name, labels, value) for labels, value in sorted(self._values.items())]


class Gauge:
    """Numbers that are asked for when they are to be shown."""

    def __init__(self, name: str, help: str, read: Callable[[], Mapping[Labels, float]], kind: str = "gauge") -> None:
        self.name, self.help, self.kind, self._read = name, help, kind, read

    def lines(self) -> list[str]:
        """One a label set."""
        return [_line(self.name, labels, value) for labels, value in self._read().items()]


class Histogram:
    """How often a time in seconds was at most so long, by labels."""

    kind = "histogram"

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def observe(self, seconds: float, **labels: str) -> None:
        """Count one time."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            counts = self._counts.setdefault(key, [0] * (len(BUCKETS) + 1))
            for number, bound in enumerate((*BUCKETS, float("inf"))):
                counts[number] += seconds <= bound
            self._sums[key] = self._sums.get(key, 0) + seconds

    def lines(self) -> list[str]:
        """The buckets, the sum and the count of each label set."""
        lines = []
        with self._lock:
            for labels, counts in sorted(self._counts.items()):
                for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
                    lines.append(_line(f"{self.name}_bucket", (*labels, ("le", bound)), count))
                lines.append(_line(f"{self.name}_sum", labels, self._sums[labels]))
                lines.append(_line(f"{self.name}_count", labels, counts[-1]))
        return lines


class Metrics:
    """All metrics of a server."""

    def __init__(self) -> None:
        self.requests = Counter("gakernels_requests_total", "Requests answered, by route and status.")
        self.seconds = Histogram("gakernels_request_seconds", "Time to answer a request, by route.")
        self.prompt_tokens = Counter("gakernels_prompt_tokens_total", "Tokens of prompts.")
        self.new_tokens = Counter("gakernels_new_tokens_total", "Tokens generated.")
        self.context_tokens = Counter("gakernels_context_tokens_total", "Tokens appended to contexts.")
        self._all: list[Counter | Gauge | Histogram] = [
            self.requests,
            self.seconds,
            self.prompt_tokens,
            self.new_tokens,
            self.context_tokens,
        ]

    def watch(
        self, name: str, help: str, read: Callable[[], float | Mapping[Labels, float]], kind: str = "gauge"
    ) -> None:
        """Show what a function says at the time: a number, or numbers by labels."""

        def values() -> Mapping[Labels, float]:
            found = read()
            return found if isinstance(found, Mapping) else {(): found}

        self._all.append(Gauge(name, help, values, kind))

    def text(self) -> str:
        """The page that Prometheus reads."""
        lines = []
        for metric in self._all:
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
        return "\n".join(lines) + "\n"


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{label}="{text.translate(_ESCAPES)}"' for label, text in labels)
    return f"{name}{{{inside}}} {value:.17g}" if inside else f"{name} {value:.17g}"
