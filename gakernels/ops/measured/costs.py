"""How much work a call is, for carrying a measured time over to other sizes.

A kernel computes whole tiles, so a tile that is half empty costs what a full one does: that is what makes the Triton
kernel of `lowrank_linear`, whose tiles never span two windows, slow at windows of one token.
"""

from collections.abc import Callable, Mapping

from gakernels.ops.measured import Measurement

SHORT, SHORT_TILE, TILE = 64, 64, 128  # rows of a window that a program of lowrank_linear's kernels takes


def expected_ms(row: Measurement, backend: str, sizes: Mapping[str, int], element: int, training: bool) -> float:
    """The time of a call from a measurement: its time by the operations, or that of the memory traffic if it is longer.

    Args:
        row: the measurement.
        backend: one that it has.
        sizes: of the call.
        element: bytes of a number of the call.
        training: whether a backward follows, which then counts.
    """
    count = _OPERATIONS[row.operation]
    more = count(sizes, backend) / count(row.sizes, backend)
    traffic = 1e3 * traffic_bytes(row.operation, sizes, element) / row.copy_bytes
    place = row.backends.index(backend)
    forward = max(row.forward_ms[place] * more, traffic)
    return forward + max(row.backward_ms[place] * more, 2 * traffic) if training else forward


def operations(operation: str, sizes: Mapping[str, int]) -> float:
    """Operations that the forward of a call needs, tiles aside."""
    return _OPERATIONS[operation](sizes, "")


def traffic_bytes(operation: str, sizes: Mapping[str, int], element: int) -> float:
    """The fewest bytes that the forward of a call moves: each input read once, each output written once."""
    return _BYTES[operation](sizes, element)


def _state_operations(sizes: Mapping[str, int], backend: str) -> float:
    rows, state = 1.0 * sizes["batch"] * sizes["tokens"], sizes["state"]
    return max(rows, 1) * (4.0 * sizes["hidden"] * state + 2.0 * state * state)


def _polar_operations(sizes: Mapping[str, int], backend: str) -> float:
    state, rank, steps = sizes["state"], sizes["rank"], 2 + 2 * sizes["power_iterations"]
    return max(sizes["batch"], 1) * steps * (2.0 * state * state * rank + 4.0 * state * rank * rank)


def _linear_operations(sizes: Mapping[str, int], backend: str) -> float:
    tokens, inputs, outputs = max(sizes["tokens"], 1), sizes["in"], sizes["out"]
    if backend == "triton":
        tokens = _whole_tiles(tokens)
    rows = 1.0 * max(sizes["batch"], 1) * tokens
    return rows * (2.0 * inputs * outputs + 2.0 * sizes["rank"] * (inputs + outputs))


def _whole_tiles(tokens: int) -> int:
    tile = SHORT_TILE if tokens <= SHORT else TILE
    return (tokens + tile - 1) // tile * tile


def filled_tiles(tokens: int) -> float:
    """The share of a window's tiles that holds tokens."""
    return tokens / _whole_tiles(tokens) if tokens else 1.0


def _product_operations(sizes: Mapping[str, int], backend: str) -> float:
    """Five for each number, the exponential counted as one: no work for matrix units."""
    return 5.0 * max(sizes["numbers"], 1)


def _state_bytes(sizes: Mapping[str, int], element: int) -> float:
    hidden, state = sizes["hidden"], sizes["state"]
    read = 1.0 * sizes["batch"] * sizes["tokens"] * hidden + 2.0 * hidden * state
    return element * read + 4.0 * sizes["batch"] * state * state


def _polar_bytes(sizes: Mapping[str, int], element: int) -> float:
    state = sizes["state"]
    return element * (1.0 * sizes["batch"] * state * (state + 2.0 * sizes["rank"]) + 1.0 * state * sizes["rank"])


def _linear_bytes(sizes: Mapping[str, int], element: int) -> float:
    windows, width = 1.0 * sizes["batch"], sizes["in"] + sizes["out"]
    return element * (windows * (sizes["tokens"] + sizes["rank"]) * width + 1.0 * sizes["in"] * sizes["out"])


def _product_bytes(sizes: Mapping[str, int], element: int) -> float:
    return 3.0 * element * sizes["numbers"]


_OPERATIONS: dict[str, Callable[[Mapping[str, int], str], float]] = {
    "context_state": _state_operations,
    "low_rank_polar": _polar_operations,
    "lowrank_linear": _linear_operations,
    "gated_product": _product_operations,
}
_BYTES: dict[str, Callable[[Mapping[str, int], int], float]] = {
    "context_state": _state_bytes,
    "low_rank_polar": _polar_bytes,
    "lowrank_linear": _linear_bytes,
    "gated_product": _product_bytes,
}
