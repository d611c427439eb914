"""`low_rank_polar` in plain PyTorch: tall GEMMs with S, and r x r symmetric functions in float64.

The derivation of the backward is in docs/numerics.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gakernels.ops import autocast


class Steps(NamedTuple):
    """What every damped polar step X -> f(X) leaves for the backward; K steps stacked after the batch dimensions."""

    inputs: Tensor  # (..., K, d_r, r): X, in the dtype of the states
    roots: Tensor  # (..., K, r) float64: h, the square roots of the eigenvalues of X^T X + c^2 I
    vectors: Tensor  # (..., K, r, r) float64: its eigenvectors V


@autocast.without
def forward(states: Tensor, sketch: Tensor, power_iterations: int, damping: float) -> tuple[Tensor, Tensor, Steps]:
    """Returns u, v (..., d_r, r) and the steps: S Omega, then S^T and S in turn, K = 2 + 2 power_iterations in all."""
    states = power_of_two_scaled(states)[0]
    inputs, roots, vectors = [], [], []
    basis, previous = sketch, sketch
    for step in range(2 + 2 * power_iterations):
        x = (states if step % 2 == 0 else states.mT) @ basis
        h, v = shifted_spectrum(x, damping)
        inputs.append(x)
        roots.append(h)
        vectors.append(v)
        previous, basis = basis, (x.double() @ inverse_root(h, v)).to(x.dtype)
    saved = Steps(torch.stack(inputs, -3), torch.stack(roots, -2), torch.stack(vectors, -3))
    return previous, basis, saved


@autocast.without
def backward(grad_u: Tensor, grad_v: Tensor, states: Tensor, sketch: Tensor, steps: Steps, damping: float) -> Tensor:
    """Gradient of the states. The steps are undone from the last; all outer products form one GEMM at the end."""
    states, exponent = power_of_two_scaled(states)
    count = steps.inputs.shape[-3]
    bases = [sketch.expand(*states.shape[:-2], *sketch.shape)]
    bases += [
        (steps.inputs[..., k, :, :].double() @ inverse_root(*_spectrum(steps, k))).to(states.dtype)
        for k in range(count - 1)
    ]
    left, right = [], []  # dS = sum of left right^T
    grad = grad_v
    for k in reversed(range(count)):
        grad_x = damped_polar_backward(grad, steps.inputs[..., k, :, :], *_spectrum(steps, k), damping)
        if k % 2 == 0:  # X = S basis
            left.append(grad_x)
            right.append(bases[k])
            grad = states.mT @ grad_x
        else:  # X = S^T basis
            left.append(bases[k])
            right.append(grad_x)
            grad = states @ grad_x
        if k == count - 1:
            grad = grad + grad_u
    return torch.ldexp(torch.cat(left, -1) @ torch.cat(right, -1).mT, -exponent)


def power_of_two_scaled(states: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each state by a power of two to a largest entry in [0.5, 1): exact, and no square overflows.

    Returns the scaled states and the exponent (..., 1, 1) that was taken out. The norm is scale-invariant.
    """
    largest = states.abs().amax((-2, -1), keepdim=True)
    limit = 120 if states.dtype == torch.float32 else 1000  # 2^exponent itself stays finite and normal
    exponent = torch.frexp(largest).exponent.clamp(-limit, limit)
    return torch.ldexp(states, -exponent), exponent


def shifted_spectrum(x: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """h (..., r) and V (..., r, r), float64, with X^T X + c^2 I = V diag(h^2) V^T and c = damping ||X||_F.

    The Gram matrix squares the spectrum, which float32 can't hold over more than about 3 decades; float64 can. A matrix
    with a NaN or infinity gives NaN, not an error, as elsewhere in PyTorch.
    """
    wide = x.double()
    gram = wide.mT @ wide
    finite = gram.isfinite().all(-1).all(-1)[..., None, None]
    eigenvalues, vectors = torch.linalg.eigh(torch.where(finite, gram, 0.0))
    shift = damping**2 * gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    return (eigenvalues.clamp(min=0) + shift).sqrt(), vectors


def inverse_root(h: Tensor, vectors: Tensor) -> Tensor:
    """M = (X^T X + c^2 I)^(-1/2) = V diag(1/h) V^T; zero for X = 0."""
    return (vectors * _reciprocal(h)[..., None, :]) @ vectors.mT


def damped_polar_backward(grad: Tensor, x: Tensor, h: Tensor, vectors: Tensor, damping: float) -> Tensor:
    """dX = G M + 2 X (G_A + damping^2 tr(G_A) I), G_A = -V [sym(V^T X^T G V)_ij / (h_i h_j (h_i + h_j))] V^T."""
    wide, upstream = x.double(), grad.double()
    inverse = _reciprocal(h)
    e = vectors.mT @ (wide.mT @ upstream) @ vectors
    pair_sum = h[..., :, None] + h[..., None, :]
    weights = inverse[..., :, None] * inverse[..., None, :] / torch.where(pair_sum == 0, 1.0, pair_sum)
    inner = -(e + e.mT) / 2 * weights
    trace = inner.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    grad_gram = vectors @ inner @ vectors.mT
    result = upstream @ inverse_root(h, vectors) + 2 * wide @ grad_gram + 2 * damping**2 * trace * wide
    return result.to(x.dtype)


def _reciprocal(h: Tensor) -> Tensor:
    """1/h (..., r), and 0 where the whole matrix is zero (every h is): value and gradient are zero there."""
    is_zero = (h == 0).all(-1, keepdim=True)
    return torch.where(is_zero, 0.0, 1.0 / torch.where(is_zero, 1.0, h))


def _spectrum(steps: Steps, k: int) -> tuple[Tensor, Tensor]:
    return steps.roots[..., k, :], steps.vectors[..., k, :, :]
