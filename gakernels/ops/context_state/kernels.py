"""The Triton kernels of `context_state`; docs/context_state.md has the way of the data through them.

P | Q are the projections A2 h | B1^T h of the tokens, kept side by side: (B, T, M, 2 d_r), contiguous. A block beyond
a size is masked, so every size may have a tail. Offsets inside a tile are 32-bit, those of its first element 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def clear_left_out(projected, mask, tokens, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write zeros over the rows of P | Q whose token the mask leaves out. A program owns some rows and columns."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = tl.load(mask + token, mask=token < tokens, other=True).to(tl.int1)
    zeros = tl.zeros((BLOCK_M, BLOCK_N), projected.dtype.element_ty)
    tl.store(projected + token[:, None] * width + column, zeros, mask=(kept == 0)[:, None] & (column < width))


@triton.jit
def prefix_states(
    projected,
    initial_state,
    states,
    chunks,
    tokens,
    state_size,
    HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """S_t = S_(t-1) + P_t^T Q_t. A program owns a tile of the states of one row of the batch, and walks its chunks."""
    tiles_q = tl.cdiv(state_size, BLOCK_Q)
    tiles = tl.cdiv(state_size, BLOCK_P) * tiles_q
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    first_p, first_q = tile // tiles_q * BLOCK_P, tile % tiles_q * BLOCK_Q
    p, q, m = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_M)
    in_p, in_q = p < state_size - first_p, q < state_size - first_q
    in_state = in_p[:, None] & in_q
    width, state_numel = 2 * state_size, tl.cast(state_size, tl.int64) * state_size
    of_tile = first_p.to(tl.int64) * state_size + first_q + (p[:, None] * state_size + q)

    state = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_state + row * state_numel + of_tile, mask=in_state, other=0.0)
    here = states + row * chunks * state_numel + of_tile
    values = projected + row * chunks * tokens * width + first_p
    keys = values - first_p + state_size + first_q
    # One loop for all chunks, so that the first tokens of the next one are on their way while a state is stored.
    left = tl.cast(tokens, tl.int32)
    for _ in range(chunks * tl.maximum(tl.cdiv(tokens, BLOCK_M), 1)):
        in_m = (m < left)[:, None]
        value = tl.load(values + (m[:, None] * width + p), mask=in_m & in_p, other=0.0)
        key = tl.load(keys + (m[:, None] * width + q), mask=in_m & in_q, other=0.0)
        state = tl.dot(tl.trans(value), key, state, input_precision=PRECISION)
        taken = tl.minimum(left, BLOCK_M).to(tl.int64) * width
        values += taken
        keys += taken
        left -= BLOCK_M
        if left <= 0:
            tl.store(here, state, mask=in_state)
            here += state_numel
            left = tl.cast(tokens, tl.int32)


@triton.jit
def suffix_gradients(
    grad_states,
    largest,
    suffix,
    scales,
    grad_initial,
    chunks,
    state_size,
    stride_row,
    stride_chunk,
    stride_p,
    stride_q,
    SCALED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """R_t = R_(t+1) + dS_t. A program owns a tile of one row of the batch, and walks its chunks from the last.

    R_1 is the gradient of the initial state, in float32. `suffix` gets all R_t in its dtype: divided, if SCALED, by the
    scale that brings the sum over t' >= t of the largest |dS_t'|, a bound of |R_t|, to 2^14, within float16's 2^16.
    """
    tiles_q = tl.cdiv(state_size, BLOCK_Q)
    tiles = tl.cdiv(state_size, BLOCK_P) * tiles_q
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    p = (tile // tiles_q * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
    q = (tile % tiles_q * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)[None, :]
    inside = (p < state_size) & (q < state_size)
    state_numel = tl.cast(state_size, tl.int64) * state_size

    total = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    bound = 0.0
    for step in range(chunks):
        chunk = row * chunks + (chunks - 1 - step)
        upstream = grad_states + row * stride_row + tl.cast(chunks - 1 - step, tl.int64) * stride_chunk
        total += tl.load(upstream + p * stride_p + q * stride_q, mask=inside, other=0.0)
        stored = total
        if SCALED:
            bound += tl.load(largest + chunk)
            scale = tl.maximum(bound, 1e-30) / 16384
            stored = total / scale
            tl.store(scales + chunk, scale, mask=tile == 0)
        tl.store(suffix + chunk * state_numel + p * state_size + q, stored.to(suffix.dtype.element_ty), mask=inside)
    tl.store(grad_initial + row * state_numel + p * state_size + q, total, mask=inside)


@triton.jit
def projection_gradient(
    projected,
    suffix,
    scales,
    mask,
    grad_projected,
    tokens,
    state_size,
    OF_VALUES: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dP_t = Q_t R_t^T (OF_VALUES) or dQ_t = P_t R_t. A program owns some tokens of one chunk and some columns."""
    tiles_n = tl.cdiv(state_size, BLOCK_N)
    tiles = tl.cdiv(tokens, BLOCK_M) * tiles_n
    chunk, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    first_m, first_n = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m, in_n = (m < tokens - first_m)[:, None], n < state_size - first_n
    width = 2 * state_size
    own: tl.constexpr = 0 if OF_VALUES else 1  # the half of P | Q whose gradient this is; the other one is read

    first_row = chunk * tokens + first_m
    others = projected + first_row * width + (1 - own) * state_size + (m[:, None] * width + k)
    sums = suffix + chunk * state_size * state_size
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, state_size, BLOCK_K):
        in_k = k < state_size - start
        other = tl.load(others + start, mask=in_m & in_k, other=0.0)
        if OF_VALUES:  # rows n of R_t, read as columns
            rows = sums + first_n.to(tl.int64) * state_size + start + (n[:, None] * state_size + k)
            total = tl.trans(tl.load(rows, mask=in_n[:, None] & in_k, other=0.0))
        else:
            rows = sums + tl.cast(start, tl.int64) * state_size + first_n + (k[:, None] * state_size + n)
            total = tl.load(rows, mask=in_k[:, None] & in_n, other=0.0)
        gradient = tl.dot(other, total, gradient, input_precision=PRECISION)

    if SCALED:
        gradient *= tl.load(scales + chunk)
    if HAS_MASK:
        kept = tl.load(mask + first_row + m, mask=m < tokens - first_m, other=False).to(tl.int1)
        gradient = tl.where(kept[:, None], gradient, 0.0)
    here = grad_projected + first_row * width + own * state_size + first_n + (m[:, None] * width + n)
    tl.store(here, gradient.to(grad_projected.dtype.element_ty), mask=in_m & in_n)
