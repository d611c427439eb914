"""Contexts of like size put together, so that a batch of them needs little padding."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Sizes = npt.NDArray[np.int64]
"""(n, 3): number of chunks T, tokens of a chunk, and tokens of all conversations of a context."""


def alike(sizes: Sizes, group: int) -> list[list[int]]:
    """The numbers 0..n-1 in groups of `group`, of contexts whose sizes are alike; `group` divides n.

    All are cut in two where that saves the most padding, in order either of the context's size or of that of the
    conversations, then each part again, down to single groups.
    """
    groups: list[list[int]] = []
    parts = [np.arange(len(sizes))]
    while parts:
        part = parts.pop()
        if len(part) <= group:
            groups.append([int(number) for number in part])
        else:
            parts.extend(_cut(part, sizes, group))
    return groups


def divided(sizes: Sizes, limit: int, price: int, unit: int = 1) -> list[slice]:
    """Consecutive parts of contexts in order of size, each for one pass: where a cut saves more padding than another
    pass is worth, and where there would be too many positions in one.

    Args:
        sizes: of the contexts.
        limit: positions in a pass of one process; a part of `unit` contexts may have more.
        price: of one more pass, in positions.
        unit: number of processes, which share each part evenly; divides n.
    """
    costs, cuts = [0], [0]
    for end in range(unit, len(sizes) + 1, unit):
        options = []
        for begin in range(0, end, unit):
            rows = (end - begin) // unit
            positions = rows * int(_positions(sizes[begin:end].max(axis=0)[None])[0])
            if positions <= limit or rows == 1:
                options.append((costs[begin // unit] + positions + price, begin))
        cost, cut = min(options)
        costs.append(cost)
        cuts.append(cut)
    parts, end = [], len(sizes)
    while end:
        parts.append(slice(cuts[end // unit], end))
        end = parts[-1].start
    return parts[::-1]


def _cut(part: npt.NDArray[np.int64], sizes: Sizes, group: int) -> Sequence[npt.NDArray[np.int64]]:
    chunks, chunk, said = sizes[part].T
    best: tuple[float, npt.NDArray[np.int64], int] | None = None
    for order in (np.lexsort((said, chunk, chunks)), np.lexsort((chunk, chunks, said))):
        ordered = sizes[part[order]]
        places = np.arange(group, len(part), group)
        left = np.maximum.accumulate(ordered)[places - 1]
        right = np.maximum.accumulate(ordered[::-1])[::-1][places]
        costs = places * _positions(left) + (len(part) - places) * _positions(right)
        least = int(costs.argmin())
        if best is None or costs[least] < best[0]:
            best = (float(costs[least]), part[order], int(places[least]))
    assert best is not None
    return best[1][: best[2]], best[1][best[2] :]


def _positions(largest: Sizes) -> npt.NDArray[np.int64]:
    """Positions that each context takes among contexts of these largest sizes."""
    positions: npt.NDArray[np.int64] = largest[:, 0] * largest[:, 1] + largest[:, 2]
    return positions
