"""The page for Prometheus, read by the rules of its text format."""

import math
import random
import re

from gakernels.server.metrics import Metrics

LINE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (\S+)')


def parsed(page: str) -> dict[tuple[str, str], float]:
    """Values by name and labels; every line must be well-formed and belong to the metric announced above it."""
    assert page.endswith("\n")
    values, announced = {}, ""
    for line in page.splitlines():
        if line.startswith("# TYPE "):
            announced = line.split()[2]
        elif not line.startswith("# HELP "):
            match = LINE.fullmatch(line)
            assert match, line
            assert match[1].startswith(announced)
            values[match[1], match[2] or ""] = float(match[3])
    return values


def test_counters_and_watched_values_are_shown() -> None:
    metrics = Metrics()
    metrics.requests.labels(route='/a"b\\c\nd', method="GET", status="200").inc()
    metrics.requests.labels(route="/x", method="POST", status="404").inc(2)
    metrics.new_tokens.inc(2**60)
    metrics.watch("gakernels_contexts", "Contexts.", lambda: 7)
    metrics.watch("gakernels_tier", "By tier.", lambda: {"cpu": 1.5, "disk": 0}, "tier")
    values = parsed(metrics.text())
    assert values["gakernels_requests_total", 'method="POST",route="/x",status="404"'] == 2
    assert values["gakernels_requests_total", 'method="GET",route="/a\\"b\\\\c\\nd",status="200"'] == 1
    assert values["gakernels_new_tokens_total", ""] == 2**60
    assert values["gakernels_contexts", ""] == 7
    assert values["gakernels_tier", 'tier="cpu"'] == 1.5


def test_a_histogram_counts_what_is_below_each_bound() -> None:
    metrics = Metrics()
    times = [random.expovariate(1) for _ in range(200)] + [1000.0]
    for seconds in times:
        metrics.seconds.labels(route="/x").observe(seconds)
    values = parsed(metrics.text())
    buckets = {labels: value for (name, labels), value in values.items() if name.endswith("_bucket")}
    assert len(buckets) == 13
    for labels, count in buckets.items():
        bound = float(re.search(r'le="([^"]*)"', labels)[1].replace("+Inf", "inf"))
        assert count == sum(seconds <= bound for seconds in times)
    assert values["gakernels_request_seconds_count", 'route="/x"'] == len(times)
    assert math.isclose(values["gakernels_request_seconds_sum", 'route="/x"'], sum(times))
