"""Several sets of segments as one, each with its share of every batch."""

import bisect
import functools
import hashlib
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gakernels.data.order import ShuffledOrder, batch_positions, permuted
from gakernels.data.segments import SegmentSet
from gakernels.errors import InputError

BLOCK = 1000  # in as many consecutive positions the shares are exact


class JoinedSegments:
    """Sets of segments one after the other, with documents of their own.

    Args:
        parts: at least one.

    Raises:
        InputError: their segments differ in length.
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
        """Of the parts and their order."""
        return hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode()).hexdigest()[:32]

    def take(self, indices: Sequence[int]) -> Tensor:
        """Some of them, (indices, length) int64, on the CPU."""
        rows = [torch.empty(0, self.length, dtype=torch.int64)]
        for index in indices:
            part = bisect.bisect_right(self._offsets, index) - 1
            rows.append(self.parts[part].take([index - self._offsets[part]]))
        return torch.cat(rows)


class MixedOrder:
    """Each part has its share of the steps, whatever its size: a small one is simply seen more often.

    Of every 1,000 consecutive positions each part takes its weight's share, at places drawn by the seed. Within a part
    the order is that of `ShuffledOrder`: every segment once before one comes again.

    Args:
        counts: segments of each part, as they stand in `JoinedSegments`.
        weights: positive; they need not sum to one and count to 1/1000 of their sum.

    Raises:
        InputError: a part is empty, or its weight is no positive number of at least 1/2000 of the sum.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float]) -> None:
        if len(counts) != len(weights) or not counts:
            raise InputError(f"weights must be one for each of {len(counts)} sources, but they are {list(weights)}")
        self._orders = [ShuffledOrder(count) for count in counts]
        self._offsets = list(itertools.accumulate(counts, initial=0))
        self._shares = _shares(weights)
        self._pattern = functools.lru_cache(2)(self._block_pattern)

    def indices(self, step: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> list[int]:
        """See `Order`; numbers of `JoinedSegments`."""
        return [self._index(position, seed) for position in batch_positions(step, batch_size, rank, world)]

    def _index(self, position: int, seed: int) -> int:
        block, place = divmod(position, BLOCK)
        part, earlier = self._pattern(block, seed)[place]
        return self._offsets[part] + self._orders[part].index(block * self._shares[part] + earlier, seed)

    def _block_pattern(self, block: int, seed: int) -> list[tuple[int, int]]:
        """For each place of a block: whose turn it is, and how many turns that part had in the block before."""
        parts = [part for part, share in enumerate(self._shares) for _ in range(share)]
        turns = [0] * len(self._shares)
        pattern = []
        for place in range(BLOCK):
            part = parts[permuted(place, BLOCK, f"{seed} mixture {block}")]
            pattern.append((part, turns[part]))
            turns[part] += 1
        return pattern


def _shares(weights: Sequence[float]) -> list[int]:
    """How many of `BLOCK` places each weight gets, by the largest remainders."""
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(f"weights must be positive numbers, but they are {list(weights)}")
    exact = [weight / math.fsum(weights) * BLOCK for weight in weights]
    shares = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda part: shares[part] - exact[part])
    for part in by_rest[: BLOCK - sum(shares)]:
        shares[part] += 1
    if 0 in shares:
        raise InputError(f"each weight must be at least 1/{BLOCK} of their sum, but they are {list(weights)}")
    return shares
