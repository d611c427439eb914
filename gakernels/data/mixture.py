"""Several sources as one: segments with a fixed share of every batch, contexts in pools drawn from every source."""

import bisect
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gakernels.data.order import ShuffledOrder, batch_positions, permuted
from gakernels.data.segments import SegmentSet
from gakernels.errors import InputError

BLOCK = 1000  # the shares are exact in every block of so many positions


class JoinedSegments:
    """Sets of segments, concatenated; no document belongs to two of them.

    Args:
        parts: at least one.

    Raises:
        InputError: the lengths of their segments differ.
    """

    def __init__(self, parts: Sequence[SegmentSet]) -> None:
        lengths = {part.length for part in parts}
        if len(lengths) != 1:
            raise InputError(f"segments of a mixture must have one length, but they have {sorted(lengths)}")
        self.parts = tuple(parts)
        self._offsets = list(itertools.accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._offsets[-1]

    @property
    def length(self) -> int:
        """Tokens in a segment."""
        return self.parts[0].length

    @property
    def document_ids(self) -> NDArray[np.int64]:
        """(n,) the document of each segment; documents of different parts have different numbers."""
        ids, first = [], 0
        for part in self.parts:
            ids.append(part.document_ids + first)
            first = first + int(part.document_ids.max(initial=-1)) + 1
        return np.concatenate(ids)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the parts and their order."""
        return hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode()).hexdigest()[:32]

    def take(self, indices: Sequence[int]) -> Tensor:
        """The segments of these numbers, (indices, length) int64, on the CPU."""
        rows = [torch.empty(0, self.length, dtype=torch.int64)]
        for index in indices:
            part = bisect.bisect_right(self._offsets, index) - 1
            rows.append(self.parts[part].take([index - self._offsets[part]]))
        return torch.cat(rows)


class MixedOrder:
    """Each part gets its share of the steps regardless of its size, so a small one is seen more often.

    Of every 1,000 consecutive positions each part gets its weight's share, at places drawn from the seed. Within a part
    the order is that of `ShuffledOrder`: every segment once before any is repeated.

    Args:
        counts: segments of each part, in the order of `JoinedSegments`.
        weights: positive; they need not sum to one, and are rounded to 1/1000 of their sum.

    Raises:
        InputError: a part is empty, or its weight is not positive or rounds to none of 1,000 parts of the sum.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float]) -> None:
        if len(counts) != len(weights) or not counts:
            raise InputError(f"weights must be one for each of {len(counts)} sources, but they are {list(weights)}")
        self._orders = [ShuffledOrder(count) for count in counts]
        self._offsets = list(itertools.accumulate(counts, initial=0))
        self._shares = _block_shares(weights)
        self._pattern = lru_cache(maxsize=2)(self._block_pattern)

    def indices(self, step: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> list[int]:
        """See `Order`; the numbers are those of `JoinedSegments`."""
        return [self._index(position, seed) for position in batch_positions(step, batch_size, rank, world)]

    def _index(self, position: int, seed: int) -> int:
        block, place = divmod(position, BLOCK)
        part, earlier = self._pattern(block, seed)[place]
        return self._offsets[part] + self._orders[part].index(block * self._shares[part] + earlier, seed)

    def _block_pattern(self, block: int, seed: int) -> list[tuple[int, int]]:
        """For each place of a block: its part, and how many earlier places of the block belong to that part."""
        parts = [part for part, share in enumerate(self._shares) for _ in range(share)]
        turns = [0] * len(self._shares)
        pattern = []
        for place in range(BLOCK):
            part = parts[permuted(place, BLOCK, f"{seed} mixture {block}")]
            pattern.append((part, turns[part]))
            turns[part] += 1
        return pattern


def _block_shares(weights: Sequence[float]) -> list[int]:
    """How many of `BLOCK` places each weight gets."""
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(f"weights must be positive numbers, but they are {list(weights)}")
    shares = _rounded([weight / math.fsum(weights) * BLOCK for weight in weights], BLOCK)
    if 0 in shares:
        raise InputError(f"each weight must be at least 1/{BLOCK} of their sum, but they are {list(weights)}")
    return shares


@dataclass(frozen=True)
class Draw:
    """One context: the number of its source, its place there, and how many rounds of the source came before."""

    source: int
    index: int
    round: int


class MixedContexts:
    """An endless sequence of contexts from several sources, in pools of equal size.

    A pool holds contexts of every source by weight, rounded to whole numbers, at least one each; each source repeats on
    its own, every round in a fresh order.

    Args:
        sizes: number of contexts of each source.
        weights: share of each source; None to use its size.
        pool: contexts in a pool.
        seed: of the orders.

    Raises:
        InputError: a source is empty, or a pool is too small for one context of each source.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float | None], pool: int, seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise InputError(f"every source must have a context, but the sources have {list(sizes)}")
        if pool < len(sizes):
            raise InputError(f"batch_size must be at least the number of sources ({len(sizes)}), but it is {pool}")
        self.sizes, self.pool, self._seed = tuple(sizes), pool, seed
        self.shares = _pool_shares(
            [size if weight is None else weight for size, weight in zip(sizes, weights, strict=True)], pool
        )
        self._order = lru_cache(maxsize=2 * len(sizes) + 2)(self._draw_order)

    def draw(self, number: int) -> list[Draw]:
        """The contexts of a pool, counted from 0, source by source."""
        draws = []
        for source, share in enumerate(self.shares):
            size = self.sizes[source]
            for position in range(number * share, (number + 1) * share):
                round_, place = divmod(position, size)
                draws.append(Draw(source, self._order(source, round_)[place], round_))
        return draws

    def _draw_order(self, source: int, round_: int) -> list[int]:
        order = list(range(self.sizes[source]))
        Random(f"{self._seed} order {source} {round_}").shuffle(order)
        return order


def chosen(count: int, wanted: int, draw: Draw, seed: int) -> list[int]:
    """Which of the `count` conversations of a context are used this time: later rounds continue where this one ends."""
    order = list(range(count))
    Random(f"{seed} conversations {draw.source} {draw.index}").shuffle(order)
    if wanted >= count:
        return order
    return [order[(draw.round * wanted + offset) % count] for offset in range(wanted)]


def _pool_shares(weights: Sequence[float], pool: int) -> tuple[int, ...]:
    """How many of the contexts of a pool each weight gets, at least 1."""
    rest, total = pool - len(weights), sum(weights)
    exact = [max(0.0, pool * weight / total - 1) for weight in weights]
    return tuple(share + 1 for share in _rounded([rest * value / (sum(exact) or 1) for value in exact], rest))


def _rounded(exact: Sequence[float], total: int) -> list[int]:
    """Round numbers with the sum `total` to whole numbers with that sum: the largest remainders go up."""
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: shares[place] - exact[place])
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    return shares
