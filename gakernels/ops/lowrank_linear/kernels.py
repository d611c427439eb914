"""The three Triton kernels of `lowrank_linear`, for Hopper GPUs first. `triton.py` launches them.

Strides are in elements and named `tensor_dimension`; offsets are 64-bit. Rows and columns past the edge wrap around to
some that exist, and what they give is not stored: only the dimension that is summed over is masked.
"""

import triton
import triton.language as tl


@triton.jit
def add_product(
    total, left, right, first, last, left_stride, right_stride, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """total + left right over first..last-1. left (M, BLOCK_K) and right (BLOCK_K, N) point to the first block."""
    block = tl.arange(0, BLOCK_K)
    left_step, right_step = BLOCK_K * tl.cast(left_stride, tl.int64), BLOCK_K * tl.cast(right_stride, tl.int64)
    for k in range(first, last, BLOCK_K):
        inside = block < last - k
        a = tl.load(left, mask=inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += left_step
        right += right_step
    return total


@triton.jit
def block_of(index, size, BLOCK: tl.constexpr):
    """Block `index` of a dimension: its places, and those to read, which wrap around at the edge."""
    places = index * BLOCK + tl.arange(0, BLOCK)
    return places, (places % size).to(tl.int64)


@triton.jit
def adapter_of(window, adapter_index):
    """The adapter of a window, -1 for none."""
    return tl.cast(window, tl.int64) if adapter_index is None else tl.load(adapter_index + window)


@triton.jit
def shrink(
    inputs,  # (windows, tokens, depth)
    factors,  # (adapters, depth, rank)
    adapter_index,  # (windows,) or None
    outputs,  # (splits, windows, tokens, rank), contiguous
    tokens,
    depth,
    rank,
    share,  # of the depth, for a split
    scale,
    inputs_window,
    inputs_token,
    inputs_depth,
    factors_adapter,
    factors_depth,
    factors_rank,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """outputs = scale inputs factors_i, i the adapter of the window; zero for a window without one.

    A program owns BLOCK_M tokens of one window, BLOCK_R columns and one share of the depth.
    """
    tiles = tl.cdiv(tokens, BLOCK_M)
    window = tl.program_id(0) // tiles
    split = tl.program_id(2)
    adapter = adapter_of(window, adapter_index)
    rows, read_rows = block_of(tl.program_id(0) % tiles, tokens, BLOCK_M)
    columns, read_columns = block_of(tl.program_id(1), rank, BLOCK_R)
    first = split * share
    last = tl.where(adapter < 0, first, tl.minimum(first + share, depth))
    k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
    left = inputs + window.to(tl.int64) * inputs_window + read_rows[:, None] * inputs_token + k[None, :] * inputs_depth
    right = factors + adapter * factors_adapter + k[:, None] * factors_depth + read_columns[None, :] * factors_rank

    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    total = add_product(total, left, right, first, last, inputs_depth, factors_depth, BLOCK_K, PRECISION) * scale

    windows = tl.num_programs(0) // tiles
    row = (split * windows + window).to(tl.int64) * tokens + rows
    inside = (rows < tokens)[:, None] & (columns < rank)[None, :]
    tl.store(outputs + row[:, None] * rank + columns[None, :], total.to(outputs.dtype.element_ty), mask=inside)


@triton.jit
def linear(
    inputs,  # (windows, tokens, depth)
    weight,  # (depth, width)
    shrunk,  # (windows, tokens, rank), contiguous
    factors,  # (adapters, rank, width)
    adapter_index,  # (windows,) or None
    bias,  # (width,) or None
    outputs,  # (windows, tokens, width), contiguous
    windows,
    tokens,
    depth,
    width,
    rank,
    scale,
    inputs_window,
    inputs_token,
    inputs_depth,
    weight_depth,
    weight_width,
    factors_adapter,
    factors_rank,
    factors_width,
    bias_width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """outputs = inputs weight + scale shrunk factors_i (+ bias), i the adapter of the window, rounded once.

    A program owns BLOCK_M tokens of one window and BLOCK_N columns. The low-rank term comes first, so that `scale`
    multiplies float32 sums; it is like `rank` more of the depth, and none for a window without an adapter.
    """
    tiles = tl.cdiv(tokens, BLOCK_M)
    row_tile, column_tile = tile_of(tl.program_id(0), windows * tiles, tl.cdiv(width, BLOCK_N), GROUP_M)
    window = (row_tile // tiles).to(tl.int64)
    adapter = adapter_of(window, adapter_index)
    rows, read_rows = block_of(row_tile % tiles, tokens, BLOCK_M)
    columns, read_columns = block_of(column_tile, width, BLOCK_N)

    k = tl.arange(0, BLOCK_R).to(tl.int64)
    left = shrunk + (window * tokens + read_rows)[:, None] * rank + k[None, :]
    right = factors + adapter * factors_adapter + k[:, None] * factors_rank + read_columns[None, :] * factors_width
    ranks = tl.where(adapter < 0, 0, rank)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = add_product(total, left, right, 0, ranks, 1, factors_rank, BLOCK_R, PRECISION) * scale

    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left = inputs + window * inputs_window + read_rows[:, None] * inputs_token + k[None, :] * inputs_depth
    right = weight + k[:, None] * weight_depth + read_columns[None, :] * weight_width
    total = add_product(total, left, right, 0, depth, inputs_depth, weight_depth, BLOCK_K, PRECISION)

    if bias is not None:
        total += tl.load(bias + read_columns * bias_width).to(tl.float32)[None, :]
    row = window * tokens + rows
    inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    tl.store(outputs + row[:, None] * width + columns[None, :], total.to(outputs.dtype.element_ty), mask=inside)


@triton.jit
def tile_of(program, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """Row and column tile of a program: down GROUP_M row tiles, then to the next column, so that all stay in L2."""
    group = program // (GROUP_M * column_tiles)
    within = program % (GROUP_M * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % height, within // height


@triton.jit
def factor_gradient(
    wide,  # (windows, tokens, width)
    shrunk,  # (windows, tokens, rank), contiguous
    adapter_index,  # (windows,) or None
    gradients,  # (splits, adapters, width, rank)
    windows,
    tokens,
    width,
    rank,
    share,  # of the tokens of a window, for a split
    scale,
    wide_window,
    wide_token,
    wide_width,
    gradients_split,
    gradients_adapter,
    gradients_width,
    gradients_rank,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gradients_i = scale sum of wide^T shrunk over the windows of adapter i, in their order; zero if it has none.

    A program owns BLOCK_N columns and BLOCK_R ranks of one adapter, and one share of the tokens of every window.
    """
    tiles = tl.cdiv(width, BLOCK_N)
    adapter = tl.program_id(0) // tiles
    columns, read_columns = block_of(tl.program_id(0) % tiles, width, BLOCK_N)
    ranks, read_ranks = block_of(tl.program_id(1), rank, BLOCK_R)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, tokens)
    token = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
    first_window, last_window = adapter, adapter + 1
    if adapter_index is not None:
        first_window, last_window = 0, windows

    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for window in range(first_window, last_window):
        end = tl.where(adapter_of(window, adapter_index) == adapter, last, first)
        place = tl.cast(window, tl.int64)
        left = wide + place * wide_window + read_columns[:, None] * wide_width + token[None, :] * wide_token
        right = shrunk + (place * tokens + token)[:, None] * rank + read_ranks[None, :]
        total = add_product(total, left, right, first, end, wide_token, rank, BLOCK_K, PRECISION)

    inside = (columns < width)[:, None] & (ranks < rank)[None, :]
    place = tl.program_id(2).to(tl.int64) * gradients_split + adapter.to(tl.int64) * gradients_adapter
    places = columns.to(tl.int64)[:, None] * gradients_width + ranks[None, :] * gradients_rank
    tl.store(gradients + place + places, (total * scale).to(gradients.dtype.element_ty), mask=inside)
