"""The counts of a server, in Prometheus's format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


class Metrics:
    """All metrics of one server; not shared between servers."""

    def __init__(self) -> None:
        self._own = CollectorRegistry()
        self._watched: list[Callable[[], Metric]] = []

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=self._own)

        self.requests = counter(
            "gakernels_requests_total", "Requests answered, by route and status.", "route", "method", "status"
        )
        self.seconds = Histogram(
            "gakernels_request_seconds",
            "Time to answer a request, by route.",
            ["route"],
            registry=self._own,
            buckets=BUCKETS,
        )
        self.prompt_tokens = counter("gakernels_prompt_tokens_total", "Tokens of prompts.")
        self.new_tokens = counter("gakernels_new_tokens_total", "Tokens generated.")
        self.context_tokens = counter("gakernels_context_tokens_total", "Tokens appended to contexts.")

    def watch(
        self, name: str, help: str, read: Callable[[], float | Mapping[str, float]], label: str | None = None
    ) -> None:
        """Show the present value of a function; a name that ends in `_total` belongs to a number that only grows.

        Args:
            name: name of the metric.
            help: its description.
            read: returns a number, or numbers by the values of the label.
            label: name of the label, if there is one.
        """
        kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily

        def family() -> Metric:
            metric, found = kind(name, help, labels=[] if label is None else [label]), read()
            for value, number in found.items() if isinstance(found, Mapping) else [(None, found)]:
                metric.add_metric([] if value is None else [value], number)
            return metric

        self._watched.append(family)

    def collect(self) -> Iterator[Metric]:
        """All metrics, without their `_created` times, which would double their number."""
        for metric in self._own.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
        for read in self._watched:
            yield read()

    def text(self) -> str:
        """The page that Prometheus reads."""
        return generate_latest(self).decode()
