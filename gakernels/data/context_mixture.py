"""Which contexts of which sources a step sees, and which of their conversations: a function of the position alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from gakernels.errors import InputError


@dataclass(frozen=True)
class Draw:
    """One context: number of its source, its place there, and how often the source had been gone through before."""

    source: int
    index: int
    round: int


class Mixture:
    """An endless sequence of contexts, in pools of equal size.

    A pool holds every source by its weight, to the nearest whole number and at least one context; the sources go round
    on their own, each round in a fresh order.

    Args:
        sizes: number of contexts of each source.
        weights: share of each source, None for its size.
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
        self.shares = _shares(
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
    """Which of the `count` conversations of a context are had this time: later rounds go on where this one ends."""
    order = list(range(count))
    Random(f"{seed} conversations {draw.source} {draw.index}").shuffle(order)
    if wanted >= count:
        return order
    return [order[(draw.round * wanted + offset) % count] for offset in range(wanted)]


def _shares(weights: Sequence[float], pool: int) -> tuple[int, ...]:
    """Whole numbers with sum `pool`, at least 1 each, in proportion to the weights: the largest remainders go up."""
    rest, total = pool - len(weights), sum(weights)
    exact = [max(0.0, pool * weight / total - 1) for weight in weights]
    exact = [rest * value / (sum(exact) or 1) for value in exact]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: rest - sum(shares)]:
        shares[source] += 1
    return tuple(share + 1 for share in shares)
