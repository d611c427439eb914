"""Which segments a step takes: a pure function of step, batch size, seed, rank and world size.

So a resumed run sees the same segments, even with a different number of processes.
"""

import hashlib
import math
from typing import Protocol

from gakernels.errors import InputError

_ROUNDS = 16  # fewer do not shuffle five segments well


class Order(Protocol):
    """Which segments a step takes."""

    def indices(self, step: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> list[int]:
        """The share of process `rank` of `world` in the batch of a step: consecutive segments of the global batch.

        Args:
            step: counted from 0.
            batch_size: segments in the step, over all processes.
            seed: of the order.
            rank: number of the process.
            world: number of processes; must divide the batch.

        Raises:
            InputError: the world size does not divide the batch size.
        """


class ShuffledOrder:
    """All segments once in an epoch, every epoch in a fresh order; a batch may span two epochs.

    Args:
        count: how many segments there are.

    Raises:
        InputError: there are none.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise InputError("data: there is no segment to train on")
        self.count = count

    def indices(self, step: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> list[int]:
        """See `Order`."""
        return [self.index(position, seed) for position in batch_positions(step, batch_size, rank, world)]

    def index(self, position: int, seed: int) -> int:
        """The segment at a position of the endless sequence of epochs."""
        epoch, place = divmod(position, self.count)
        return permuted(place, self.count, f"{seed} {epoch}")


def batch_positions(step: int, batch_size: int, rank: int, world: int) -> range:
    """The positions, in the sequence of all segments of a run, of a process's share of a step's batch.

    Raises:
        InputError: the world size does not divide the batch size.
    """
    if batch_size < 1 or batch_size % world:
        raise InputError(f"batch_size must be a multiple of the number of processes, {world}, but it is {batch_size}")
    part = batch_size // world
    start = step * batch_size + rank * part
    return range(start, start + part)


def permuted(place: int, count: int, key: str) -> int:
    """The image of a number under a keyed pseudo-random permutation of 0..count-1; needs no table.

    A Feistel network over a rectangle of at least `count` cells (Black and Rogaway, Ciphers with arbitrary finite
    domains, 2002): each round moves one coordinate by a keyed hash of the other. A number that leaves the range goes
    through it again until it is back; the rectangle is hardly larger than the range, so this is rare.
    """
    rows = (math.isqrt(count - 1) + 2) // 2 * 2  # were rows and columns odd, all permutations of cells would be even
    columns = -(-count // rows)
    while True:
        place = _round_trip(place, rows, columns, key)
        if place < count:
            return place


def _round_trip(place: int, rows: int, columns: int, key: str) -> int:
    row, column = divmod(place, columns)
    for step in range(_ROUNDS // 2):
        row = (row + _hash(f"{key} {step} row {column}")) % rows
        column = (column + _hash(f"{key} {step} column {row}")) % columns
    return row * columns + column


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
