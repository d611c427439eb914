"""Parts of the tests for processes that run side by side: `pytest --shard 2/14` runs the second of 14.

Which tests are in a part follows from what was collected alone. Those marked `large` are a part of their own: together
they would need more memory than a GPU has.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import pytest


class Shard(NamedTuple):
    """The part `number`, from 1 to `count`."""

    number: int
    count: int


def parse(text: str) -> Shard:
    """Raises: argparse.ArgumentTypeError: it is not K/N with 1 <= K <= N."""
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdecimal() for part in parts) and 1 <= int(parts[0]) <= int(parts[1]):
        return Shard(int(parts[0]), int(parts[1]))
    raise argparse.ArgumentTypeError(f"must be K/N, the K-th of N parts, but it is {text!r}")


def part_of(items: Sequence[pytest.Item], shard: Shard) -> list[pytest.Item]:
    """The items of a part: the large ones are the last, all others are dealt out one by one."""
    large = [item for item in items if item.get_closest_marker("large")]
    if shard.count == 1 or not large:
        return list(items[shard.number - 1 :: shard.count])
    if shard.number == shard.count:
        return large
    return [item for item in items if not item.get_closest_marker("large")][shard.number - 1 :: shard.count - 1]
