"""Which conversations share a window, and the sizes of batches."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Packed = list[list[list[int]]]
"""For each context its windows, each a list of numbers of conversations."""


@dataclass(frozen=True)
class Rounding:
    """Few sizes, for what is compiled for each shape: powers of two, and one and a half times such.

    Batches are padded up to the next one; no size but a number of windows exceeds its limit.

    Attributes:
        chunk: largest number of tokens in a chunk of a context; an eighth of it is the least in any window.
        chunks: largest number of chunks of a context.
        conversation: largest number of tokens in a conversation.
    """

    chunk: int
    chunks: int
    conversation: int

    def chunk_count(self, chunks: int) -> int:
        """T."""
        return min(_rounded(chunks), self.chunks)

    def chunk_tokens(self, tokens: int) -> int:
        """M of chunks."""
        return self._tokens(tokens, self.chunk)

    def window_sizes(self, longest: int, limit: int | None) -> list[int]:
        """M of windows for conversations of up to `longest` tokens; the first may be too small for two of them."""
        sizes = [self._tokens(longest, self.conversation)]
        while limit is not None and sizes[-1] < limit:
            sizes.append(min(_rounded(sizes[-1] + 1), limit))
        return sizes

    def _tokens(self, tokens: int, limit: int) -> int:
        return min(_rounded(max(tokens, self.chunk // 8)), limit)


def _rounded(number: int) -> int:
    """The least power of two, or one and a half times such, that is not below a number."""
    power = _power_of_two(number)
    return power // 4 * 3 if power // 4 * 3 >= number else power


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def windows_of(
    lengths: Sequence[Sequence[int]], limit: int | None, rounding: Rounding | None = None
) -> tuple[Packed, int, int]:
    """The windows of conversations about several contexts, and the number N and length M of all windows.

    Args:
        lengths: for each context, the tokens of its conversations.
        limit: longest window allowed, at least the longest conversation; None gives each conversation its own window.
        rounding: of M; N then is a power of two for each context. Windows without a conversation fill them up.
    """
    alone = [[[number] for number in range(len(row))] for row in lengths]
    if rounding is None:
        windows = alone if limit is None else pack(lengths, limit)
        return windows, sum(map(len, windows)), window_length(windows, lengths)
    options = []
    for size in rounding.window_sizes(max(map(max, lengths)), limit):
        windows = alone if limit is None else [_first_fit(row, size) for row in lengths]
        count = len(lengths) * _power_of_two(math.ceil(sum(map(len, windows)) / len(lengths)))
        options.append((windows, count, size))
    return min(options, key=lambda option: option[1] * option[2])


def pack(lengths: Sequence[Sequence[int]], limit: int) -> list[list[list[int]]]:
    """Windows of conversations for each of several contexts, chosen so that they are small when padded to the longest.

    Conversations about different contexts never share a window: a window has one adapter.

    Args:
        lengths: for each context, the tokens of its conversations.
        limit: longest window allowed; at least the longest conversation.

    Returns:
        For each context its windows, each a list of numbers of conversations.
    """
    longest = max(map(max, lengths))
    sums = [sum(row) for row in lengths]
    capacities = {-(-total // windows) for total in sums for windows in range(1, 9)}
    capacities |= {longest * times for times in range(1, 9)}
    candidates = sorted({min(max(capacity, longest), limit) for capacity in capacities})
    packed = ([_first_fit(row, capacity) for row in lengths] for capacity in candidates)
    return min(packed, key=lambda windows: _positions(windows, lengths))


def window_length(windows: Iterable[Sequence[Sequence[int]]], lengths: Sequence[Sequence[int]]) -> int:
    """The number of tokens in the longest window."""
    return max(sum(row[n] for n in window) for of_row, row in zip(windows, lengths, strict=True) for window in of_row)


def _positions(windows: Sequence[Sequence[Sequence[int]]], lengths: Sequence[Sequence[int]]) -> int:
    return sum(map(len, windows)) * window_length(windows, lengths)


def _first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit packing: longest first, each into the first window with room."""
    windows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((n for n, free in enumerate(room) if free >= lengths[number]), len(windows))
        if place == len(windows):
            windows.append([])
            room.append(capacity)
        windows[place].append(number)
        room[place] -= lengths[number]
    return windows
