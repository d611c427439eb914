"""The inverse square root of the last step as a sum of shifted inverses, for devices where eigenvectors are slow.

On a GPU PyTorch finds eigenvectors matrix by matrix and waits for each. Here the host loops over groups of poles only,
whatever the number of matrices, and waits for nothing. The library calls are those that PyTorch's CUDA code turns into
one launch for a whole batch: Cholesky factors, triangular solves of fewer than 64 rows, and products
(docs/low_rank_polar.md).
"""

import math

import torch
from torch import Tensor

from gakernels.ops.low_rank_polar.poles import inverse_root_poles

ROOT_ERROR = {torch.float32: 1e-9, torch.float64: 1e-14}  # of the root, relative, by the dtype of the states
LARGEST_CONDITION = 2e15  # that the least damping leaves
GROUP = 2**24  # numbers in a group of shifted matrices: 128 MiB
BLOCK = 32  # rows of a triangle that is solved by one call


def inverse_root(product: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """M = (X^T X + c^2 I)^(-1/2) from X^T X (..., r, r) float64; zero for X = 0. For states of a dtype."""
    normal, scale = _normal(product)
    total = torch.zeros_like(product)
    for shifts, weights in _groups(product, damping, dtype):
        factors = _inverse_factors(normal, damping, shifts)
        stacked = (factors * weights.sqrt()).flatten(-3, -2)
        total = total + stacked.mT @ stacked
    return total * scale.sqrt()


def root_gradient(e: Tensor, product: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """-2 G_A = sum of w R (E + E^T) R over the shifted inverses R, for E = X^T G: the derivative of `inverse_root`."""
    normal, scale = _normal(product)
    symmetric = (e + e.mT).unsqueeze(-3)
    total = torch.zeros_like(product)
    for shifts, weights in _groups(product, damping, dtype):
        factors = _inverse_factors(normal, damping, shifts)
        inverses = factors.mT @ factors
        total = total + inverses.flatten(-3, -2).mT @ (symmetric @ (inverses * weights)).flatten(-3, -2)
    return total * scale**1.5


def _normal(product: Tensor) -> tuple[Tensor, Tensor]:
    """X^T X with a trace of one, and the factor (..., 1, 1) that brings it there: 0 for X = 0."""
    trace = product.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    scale = torch.where(trace == 0, 0.0, 1.0 / torch.where(trace == 0, 1.0, trace))
    return product * scale, scale


def _groups(product: Tensor, damping: float, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Poles and weights (n, 1, 1) each, in groups of n whose shifted matrices fit the memory of a group."""
    poles, weights = inverse_root_poles(damping, ROOT_ERROR[dtype], LARGEST_CONDITION)
    zero = product.new_zeros(1, 1)
    # Scalars of a foreach operation are arguments of its kernel: a copy from the host would wait for the device.
    numbers = torch.stack(torch._foreach_add([zero] * (2 * len(poles)), [*poles, *weights]))
    count = max(1, GROUP // max(1, product.numel()))
    return list(zip(numbers[: len(poles)].split(count), numbers[len(poles) :].split(count), strict=True))


def _inverse_factors(normal: Tensor, damping: float, shifts: Tensor) -> Tensor:
    """L^(-1) (..., n, r, r) with L L^T = normal + (damping^2 + shift) I; NaN for one that is not positive definite."""
    identity = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    factors, info = torch.linalg.cholesky_ex(normal.unsqueeze(-3) + (shifts + damping**2) * identity)
    return triangular_inverse(factors).masked_fill((info != 0)[..., None, None], torch.nan)


def triangular_inverse(factors: Tensor) -> Tensor:
    """L^(-1) of lower triangular matrices (..., r, r).

    The blocks on the diagonal are solved for at once. Then neighbours are joined, two blocks at a time:

        [A   ]^(-1)   [    A^(-1)            ]
        [C  B]      = [-B^(-1) C A^(-1) B^(-1)]
    """
    rank = factors.shape[-1]
    count = 2 ** max(0, math.ceil(math.log2(rank / BLOCK)))
    block = -(-rank // count)
    missing = count * block - rank
    if missing:  # the identity
        factors = torch.nn.functional.pad(factors, (0, missing, 0, missing))
        factors[..., rank:, rank:].diagonal(dim1=-2, dim2=-1).fill_(1)
    identity = torch.eye(block, dtype=factors.dtype, device=factors.device)
    blocks = _diagonal_blocks(factors, block)
    inverse = torch.linalg.solve_triangular(blocks, identity.expand_as(blocks), upper=False)
    while inverse.shape[-3] > 1:
        upper, lower = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = _diagonal_blocks(factors, 2 * block)[..., block:, :block]
        left = torch.cat([upper, -(lower @ corner @ upper)], -2)
        inverse = torch.cat([left, torch.cat([torch.zeros_like(upper), lower], -2)], -1)
        block *= 2
    return inverse.squeeze(-3)[..., :rank, :rank]


def _diagonal_blocks(matrices: Tensor, block: int) -> Tensor:
    """The blocks (..., n, block, block) on the diagonal of matrices (..., n block, n block)."""
    count = matrices.shape[-1] // block
    return (
        matrices.unflatten(-1, (count, block)).unflatten(-3, (count, block)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    )
