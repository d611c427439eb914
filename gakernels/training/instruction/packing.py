"""Conversations about one context put together in windows, so that little padding is left."""

from collections.abc import Iterable, Sequence


def pack(lengths: Sequence[Sequence[int]], limit: int) -> list[list[list[int]]]:
    """Windows of conversations for each of several contexts, so that all of them, padded to the longest, are small.

    Conversations about different contexts never share a window: a window has one adapter.

    Args:
        lengths: for each context, the tokens of its conversations.
        limit: longest window; at least the longest conversation.

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
    """Tokens of the longest window."""
    return max(sum(row[n] for n in window) for of_row, row in zip(windows, lengths, strict=True) for window in of_row)


def _positions(windows: Sequence[Sequence[Sequence[int]]], lengths: Sequence[Sequence[int]]) -> int:
    return sum(map(len, windows)) * window_length(windows, lengths)


def _first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Longest first, each into the first window with room."""
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
