"""The inverse square root of the last step by eigenvectors: the faster form on a CPU, where LAPACK finds them."""

import torch
from torch import Tensor


def shifted_spectrum(product: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """h (..., r) and V (..., r, r), with product + c^2 I = V diag(h^2) V^T and c^2 = shift (..., 1)."""
    eigenvalues, vectors = torch.linalg.eigh(product)
    return (eigenvalues.clamp(min=0) + shift).sqrt(), vectors.contiguous()


def inverse_root(h: Tensor, vectors: Tensor) -> Tensor:
    """M = V diag(1/h) V^T; zero for X = 0."""
    return (vectors * _reciprocal(h)[..., None, :]) @ vectors.mT


def root_gradient(e: Tensor, h: Tensor, vectors: Tensor) -> Tensor:
    """-2 G_A = V [(V^T (E + E^T) V)_ij / (h_i h_j (h_i + h_j))] V^T for E = X^T G."""
    inverse = _reciprocal(h)
    pair_sum = h[..., :, None] + h[..., None, :]
    weights = inverse[..., :, None] * inverse[..., None, :] / torch.where(pair_sum == 0, 1.0, pair_sum)
    return vectors @ ((vectors.mT @ (e + e.mT) @ vectors) * weights) @ vectors.mT


def _reciprocal(h: Tensor) -> Tensor:
    """1/h (..., r), and 0 where the whole matrix is zero (every h is): value and gradient are zero there."""
    is_zero = (h == 0).all(-1, keepdim=True)
    return torch.where(is_zero, 0.0, 1.0 / torch.where(is_zero, 1.0, h))
