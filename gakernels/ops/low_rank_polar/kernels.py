"""The Triton kernels of `low_rank_polar`. Who owns what, and why, is in docs/low_rank_polar.md.

Tall matrices (n x r) are float32 and row-major. What is r x r is float64; between kernels it is padded to RANK x RANK,
a power of two, row-major. What one program computes and reads again lies in scratch memory of its own, small enough to
stay in the caches; a barrier of the program stands between writing and reading it.
"""

import triton
import triton.language as tl

# --- parts of a program -----------------------------------------------------------------------------------------------


@triton.jit
def _power_of_two(maxima, parts, PARTS: tl.constexpr):
    """The power of two that brings the largest entry of a state to [0.5, 1), between 2^-120 and 2^120, as in eager."""
    part = tl.arange(0, PARTS)
    largest = tl.max(tl.load(maxima + part, mask=part < parts, other=0.0), 0)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 126  # largest = mantissa 2^exponent, mantissa in [0.5, 1)
    exponent = tl.minimum(tl.maximum(exponent, -120), 120)
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _tall_tile(x, row, column, n, r):
    """A tile of an (n, r) float32 matrix, zero outside."""
    mask = (row < n)[:, None] & (column < r)[None, :]
    return tl.load(x + row[:, None].to(tl.int64) * r + column[None, :], mask=mask, other=0.0)


@triton.jit
def _small_tile(x, row, column, row_stride, column_stride, r):
    """A tile of an r x r float64 matrix, zero outside."""
    mask = (row < r)[:, None] & (column < r)[None, :]
    return tl.load(x + row[:, None] * row_stride + column[None, :] * column_stride, mask=mask, other=0.0)


@triton.jit
def _store_gram(
    x, other, gram, first, n, r, RANK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr
):
    """gram = x^T other over ROWS rows of two (n, r) matrices from row `first` on, COLUMNS columns at a time."""
    i = tl.arange(0, RANK)
    for left_column in range(0, RANK, COLUMNS):
        j = left_column + tl.arange(0, COLUMNS)
        total = tl.full((RANK, COLUMNS), 0.0, tl.float64)
        for start in range(0, ROWS, CHUNK):
            row = first + start + tl.arange(0, CHUNK)
            left = _tall_tile(x, row, i, n, r).to(tl.float64)
            total = tl.dot(tl.trans(left), _tall_tile(other, row, j, n, r).to(tl.float64), total, out_dtype=tl.float64)
        tl.store(gram + i[:, None] * RANK + j[None, :], total)


@triton.jit
def _product(
    a, a_row, a_column, b, b_row, b_column, r, first, RANK: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):
    """COLUMNS columns of a b from column `first` on: two r x r float64 matrices with any strides."""
    i, j = tl.arange(0, RANK), first + tl.arange(0, COLUMNS)
    total = tl.full((RANK, COLUMNS), 0.0, tl.float64)
    for start in range(0, RANK, CHUNK):
        k = start + tl.arange(0, CHUNK)
        left = _small_tile(a, i, k, a_row, a_column, r)
        total = tl.dot(left, _small_tile(b, k, j, b_row, b_column, r), total, out_dtype=tl.float64)
    return total


@triton.jit
def _inverse_of_block(d, BLOCK: tl.constexpr):
    """L^(-1) for d = L L^T, BLOCK x BLOCK, by elimination in place, column by column. NaN from a bad pivot on."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    # Left of the pivot stands the inverse of the unit lower factor, on and right of it what remains to be eliminated.
    # `reduce` is `sum` without a nested function, which costs the interpreter more than all the rest.
    for step in range(BLOCK):
        pivot_row = tl.reduce(tl.where(row == step, d, 0.0), 0, tl.standard._sum_combine)[None, :]
        pivot_column = tl.reduce(tl.where(column == step, d, 0.0), 1, tl.standard._sum_combine)[:, None]
        pivot = tl.reduce(tl.where(column == step, pivot_row, 0.0), 1, tl.standard._sum_combine)[:, None]
        factor = tl.where(row > step, pivot_column / pivot, 0.0)
        d = tl.where((column == step) & (row > step), 0.0, d) - factor * tl.where(column == step, 1.0, pivot_row)
    pivots = tl.reduce(tl.where(row == column, d, 0.0), 1, tl.standard._sum_combine)[:, None]
    unit = tl.where(row > column, d, tl.where(row == column, 1.0, 0.0))
    return unit / tl.sqrt(pivots)


@triton.jit
def _inverse_factor(a, scale, shift, factor, inverse, r, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """inverse = L^(-1) for scale a + shift I = L L^T, by block columns; `a`, `factor` and `inverse` are RANK x RANK.

    Block column k of L and block row k of L^(-1) need those before them, which are read back from `factor` and
    `inverse`. Beyond r the matrix is the identity. A matrix that is not positive definite gives NaN.
    """
    whole, part = tl.arange(0, RANK), tl.arange(0, BLOCK)
    for start in range(0, RANK, BLOCK):
        here = start + part
        on_diagonal = whole[:, None] == here[None, :]
        panel = tl.load(a + whole[:, None] * RANK + here[None, :]) * scale
        panel += tl.where(on_diagonal, tl.where(here < r, shift, 1.0)[None, :], 0.0)
        rest = tl.where(here[:, None] == whole[None, :], 1.0, 0.0).to(tl.float64)
        for done in range(0, start, BLOCK):
            before = done + part
            own = -tl.load(factor + here[:, None] * RANK + before[None, :])
            panel = tl.dot(
                tl.load(factor + whole[:, None] * RANK + before[None, :]), tl.trans(own), panel, out_dtype=tl.float64
            )
            rest = tl.dot(own, tl.load(inverse + before[:, None] * RANK + whole[None, :]), rest, out_dtype=tl.float64)
        tl.store(factor + whole[:, None] * RANK + here[None, :], panel)
        tl.debug_barrier()
        block = _inverse_of_block(tl.load(factor + here[:, None] * RANK + here[None, :]), BLOCK)
        tl.debug_barrier()
        tl.store(factor + whole[:, None] * RANK + here[None, :], tl.dot(panel, tl.trans(block)))
        tl.store(inverse + here[:, None] * RANK + whole[None, :], tl.dot(block, rest))
        tl.debug_barrier()


@triton.jit
def _trace(a, RANK: tl.constexpr):
    """The trace of a RANK x RANK matrix, and its reciprocal: 0 for a zero Gram matrix, NaN for one not finite."""
    i = tl.arange(0, RANK)
    trace = tl.sum(tl.load(a + i * (RANK + 1)), 0)
    reciprocal = tl.where(trace == 0, 0.0, 1.0 / tl.where(trace == 0, 1.0, trace))
    return trace, tl.where(trace < float("inf"), reciprocal, float("nan"))


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def largest_entries(
    states, batch_stride, row_stride, column_stride, maxima, n, parts, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """maxima[b, part] = the largest |entry| in ROWS rows of state b. Grid (B * parts,)."""
    b, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row, column = (part * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, WIDTH).to(tl.int64)
    states += b.to(tl.int64) * batch_stride + row[:, None] * row_stride
    largest = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, n, WIDTH):
        mask = (row < n)[:, None] & (start + column < n)[None, :]
        entries = tl.load(states + (start + column)[None, :] * column_stride, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.abs(entries))
    tl.store(maxima + tl.program_id(0), tl.max(tl.max(largest, 1), 0))


@triton.jit
def state_product(
    states,
    batch_stride,
    row_stride,
    column_stride,
    maxima,
    parts,
    y,
    y_stride,
    extra,
    x,
    x_stride,
    other,
    other_stride,
    gram,
    n,
    r,
    blocks,
    EXTRA: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x = 2^e S y (+ extra), and gram[b, block] = x^T other over the rows of the block. Grid (B * blocks,).

    The strides give S or S^T, and may be 0 in `y_stride` for a y that all states share. A program owns BLOCK_M rows of
    x; with other = x the sum of `gram` over the blocks is the Gram matrix.
    """
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    first = block * BLOCK_M
    row, column, inner = first + tl.arange(0, BLOCK_M), tl.arange(0, RANK), tl.arange(0, BLOCK_K)
    shrink = _power_of_two(maxima + b * parts, parts, PARTS)
    states += b * batch_stride + row[:, None].to(tl.int64) * row_stride
    y += b * y_stride
    total = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(0, n, BLOCK_K):
        k = start + inner
        mask = (row < n)[:, None] & (k < n)[None, :]
        tile = tl.load(states + k[None, :].to(tl.int64) * column_stride, mask=mask, other=0.0)
        total = tl.dot(tile * shrink, _tall_tile(y, k, column, n, r), total, input_precision="tf32x3")
    if EXTRA:
        total += _tall_tile(extra + b * n * r, row, column, n, r)
    x += b * x_stride
    mask = (row < n)[:, None] & (column < r)[None, :]
    tl.store(x + row[:, None].to(tl.int64) * r + column[None, :], total, mask=mask)
    tl.debug_barrier()
    gram += (b * blocks + block) * RANK * RANK
    _store_gram(x, other + b * other_stride, gram, first, n, r, RANK, BLOCK_M, CHUNK, COLUMNS)


@triton.jit
def gram_pair(
    x,
    x_stride,
    grad,
    grams,
    n,
    r,
    blocks,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grams[b, block] = x^T x and x^T grad over the BLOCK_M rows of the block. Grid (B * blocks,)."""
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    x += b * x_stride
    grams += (b * blocks + block) * 2 * RANK * RANK
    first = block * BLOCK_M
    _store_gram(x, x, grams, first, n, r, RANK, BLOCK_M, CHUNK, COLUMNS)
    _store_gram(x, grad + b * n * r, grams + RANK * RANK, first, n, r, RANK, BLOCK_M, CHUNK, COLUMNS)


@triton.jit
def cholesky_transform(gram, transform, transform_stride, scratch, damping, r, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """W = L^(-T) with L L^T = gram + c^2 I, c^2 = damping^2 trace(gram). A program owns a matrix. Grid (B,)."""
    b = tl.program_id(0).to(tl.int64)
    gram += b * RANK * RANK
    factor, inverse = scratch + 2 * b * RANK * RANK, scratch + (2 * b + 1) * RANK * RANK
    trace, scale = _trace(gram, RANK)
    wide_damping = tl.cast(damping, tl.float64)
    _inverse_factor(gram, scale, wide_damping * wide_damping, factor, inverse, r, RANK, BLOCK)
    i = tl.arange(0, RANK)
    for start in range(0, RANK, BLOCK):
        j = start + tl.arange(0, BLOCK)
        w = tl.trans(tl.load(inverse + j[:, None] * RANK + i[None, :])) * tl.sqrt(scale)
        mask = (i < r)[:, None] & (j < r)[None, :]
        tl.store(
            transform + b * transform_stride + i[:, None] * r + j[None, :], tl.where(trace == 0, 0.0, w), mask=mask
        )


@triton.jit
def root_parts(
    gram,
    gram_stride,
    poles,
    count,
    programs,
    parts,
    scratch,
    damping,
    r,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """parts[b, p] = the terms p, p + programs, ... of A^(-1/2) = sum of weight (A + pole I)^(-1), A = gram + c^2 I.

    Poles and weights are for a gram of trace 1. Each term takes a Cholesky factor. Grid (B * programs,).
    """
    b, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    gram += b * gram_stride
    scratch += tl.program_id(0).to(tl.int64) * 2 * RANK * RANK
    parts += tl.program_id(0).to(tl.int64) * RANK * RANK
    factor, inverse = scratch, scratch + RANK * RANK
    trace, scale = _trace(gram, RANK)
    wide_damping = tl.cast(damping, tl.float64)
    i = tl.arange(0, RANK)
    for term in range(program, count, programs):
        shift = wide_damping * wide_damping + tl.load(poles + term)
        weight = tl.load(poles + count + term) * tl.sqrt(scale)
        _inverse_factor(gram, scale, shift, factor, inverse, r, RANK, BLOCK)
        for first in range(0, RANK, COLUMNS):
            j = first + tl.arange(0, COLUMNS)
            out = parts + i[:, None] * RANK + j[None, :]
            value = weight * _product(inverse, 1, RANK, inverse, RANK, 1, RANK, first, RANK, COLUMNS, BLOCK)
            tl.store(out, tl.where(term == program, 0.0, tl.load(out)) + tl.where(trace == 0, 0.0, value))
        tl.debug_barrier()


@triton.jit
def root_gradient_parts(
    gram,
    gram_stride,
    twice,
    poles,
    count,
    programs,
    parts,
    scratch,
    damping,
    r,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same terms of 2 G_A = -sum of weight R (E + E^T) R, R = (A + pole I)^(-1), `twice` = E + E^T."""
    b, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    gram += b * gram_stride
    twice += b * RANK * RANK
    scratch += tl.program_id(0).to(tl.int64) * 2 * RANK * RANK
    parts += tl.program_id(0).to(tl.int64) * RANK * RANK
    first_scratch, second_scratch = scratch, scratch + RANK * RANK
    trace, scale = _trace(gram, RANK)
    wide_damping = tl.cast(damping, tl.float64)
    i = tl.arange(0, RANK)
    for term in range(program, count, programs):
        shift = wide_damping * wide_damping + tl.load(poles + term)
        weight = -tl.load(poles + count + term) * scale * tl.sqrt(scale)
        _inverse_factor(gram, scale, shift, first_scratch, second_scratch, r, RANK, BLOCK)
        for first in range(0, RANK, COLUMNS):  # R = L^(-T) L^(-1) over L
            tile = i[:, None] * RANK + (first + tl.arange(0, COLUMNS))[None, :]
            resolvent = _product(second_scratch, 1, RANK, second_scratch, RANK, 1, RANK, first, RANK, COLUMNS, BLOCK)
            tl.store(first_scratch + tile, resolvent)
        tl.debug_barrier()
        for first in range(0, RANK, COLUMNS):  # (E + E^T) R over L^(-1)
            tile = i[:, None] * RANK + (first + tl.arange(0, COLUMNS))[None, :]
            tl.store(
                second_scratch + tile,
                _product(twice, RANK, 1, first_scratch, RANK, 1, RANK, first, RANK, COLUMNS, BLOCK),
            )
        tl.debug_barrier()
        for first in range(0, RANK, COLUMNS):
            tile = i[:, None] * RANK + (first + tl.arange(0, COLUMNS))[None, :]
            value = weight * _product(
                first_scratch, RANK, 1, second_scratch, RANK, 1, RANK, first, RANK, COLUMNS, BLOCK
            )
            before = tl.where(term == program, 0.0, tl.load(parts + tile))
            tl.store(parts + tile, before + tl.where(trace == 0, 0.0, value))
        tl.debug_barrier()


@triton.jit
def factor_gradient(
    product,
    transform,
    transform_stride,
    scratch,
    grad_gram,
    r,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """2 G_A = -W (T + T^T) W^T, T the lower triangle of `product` = G^T Y with half of its diagonal.

    A program owns COLUMNS columns. Grid (B * RANK / COLUMNS,).
    """
    blocks: tl.constexpr = RANK // COLUMNS
    b, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * COLUMNS
    product += b * RANK * RANK
    transform += b * transform_stride
    i, j = tl.arange(0, RANK), first + tl.arange(0, COLUMNS)
    tile = b * RANK * RANK + i[:, None] * RANK + j[None, :]
    total = tl.full((RANK, COLUMNS), 0.0, tl.float64)
    for start in range(0, RANK, CHUNK):
        k = start + tl.arange(0, CHUNK)
        lower, upper = tl.maximum(i[:, None], k[None, :]), tl.minimum(i[:, None], k[None, :])
        total = tl.dot(
            tl.load(product + lower * RANK + upper), _small_tile(transform, k, j, 1, r, r), total, out_dtype=tl.float64
        )
    tl.store(scratch + tile, total)
    tl.debug_barrier()
    value = _product(transform, r, 1, scratch + b * RANK * RANK, RANK, 1, r, first, RANK, COLUMNS, CHUNK)
    tl.store(grad_gram + tile, -value)


@triton.jit
def transformed(
    x,
    x_stride,
    transform,
    transform_stride,
    row_stride,
    column_stride,
    second,
    second_stride,
    grad_gram,
    damping,
    out,
    out_stride,
    n,
    r,
    steps,
    blocks,
    SECOND: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """out = x W, or x W + second (Q + damping^2 trace(Q) I) with Q = `grad_gram`. Grid (B * steps * blocks,).

    The strides give W or W^T. A program owns BLOCK_M rows. The steps of a state follow one another in memory.
    """
    step = tl.program_id(0) // blocks
    b, k_step = (step // steps).to(tl.int64), (step % steps).to(tl.int64)
    row, column = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, RANK)
    x += b * x_stride + k_step * n * r
    transform += b * transform_stride + k_step * r * r
    total = tl.full((BLOCK_M, RANK), 0.0, tl.float64)
    for start in range(0, RANK, CHUNK):
        k = start + tl.arange(0, CHUNK)
        tile = _tall_tile(x, row, k, n, r).to(tl.float64)
        total = tl.dot(
            tile, _small_tile(transform, k, column, row_stride, column_stride, r), total, out_dtype=tl.float64
        )
    if SECOND:
        second += b * second_stride
        grad_gram += b * RANK * RANK
        wide_damping = tl.cast(damping, tl.float64)
        through_shift = wide_damping * wide_damping * tl.sum(tl.load(grad_gram + column * (RANK + 1)), 0)
        for start in range(0, RANK, CHUNK):
            k = start + tl.arange(0, CHUNK)
            tile = _tall_tile(second, row, k, n, r).to(tl.float64)
            q = tl.load(grad_gram + k[:, None] * RANK + column[None, :])
            total = tl.dot(
                tile, q + tl.where(k[:, None] == column[None, :], through_shift, 0.0), total, out_dtype=tl.float64
            )
    out += b * out_stride + k_step * n * r
    mask = (row < n)[:, None] & (column < r)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * r + column[None, :], total.to(tl.float32), mask=mask)


@triton.jit
def outer_products(
    grads,
    bases,
    maxima,
    parts,
    out,
    n,
    r,
    steps,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = 2^e (sum over even k of grads_k bases_k^T + sum over odd k of bases_k grads_k^T), an n x n tile a program.

    grads and bases are (B, steps, n, r), steps is even.
    """
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(n, BLOCK_M) * tiles_n
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    grads += b * steps * n * r
    bases += b * steps * n * r
    chunks = tl.cdiv(r, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for index in range(0, steps * chunks):
        k = index // chunks
        inner = index % chunks * BLOCK_K + tl.arange(0, BLOCK_K)
        step = k.to(tl.int64) * n * r
        left = tl.where(k % 2 == 0, grads, bases) + step
        right = tl.where(k % 2 == 0, bases, grads) + step
        total = tl.dot(
            _tall_tile(left, row, inner, n, r),
            tl.trans(_tall_tile(right, column, inner, n, r)),
            total,
            input_precision="tf32x3",
        )
    shrink = _power_of_two(maxima + b * parts, parts, PARTS)
    mask = (row < n)[:, None] & (column < n)[None, :]
    tl.store(out + b * n * n + row[:, None].to(tl.int64) * n + column[None, :], total * shrink, mask=mask)
