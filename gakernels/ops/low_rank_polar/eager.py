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
    shrink = power_of_two(states)
    inputs, roots, vectors = [], [], []
    basis, previous = sketch, sketch
    for step in range(2 + 2 * power_iterations):
        x = (states if step % 2 == 0 else states.mT) @ (basis * shrink)
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
    shrink = power_of_two(states)
    left, right = [], []  # dS = sum of left right^T
    grad = grad_v
    last = steps.inputs.shape[-3] - 1
    x, h, vectors, root = _step(steps, last)
    for k in range(last, -1, -1):
        grad_x = damped_polar_backward(grad.double(), x, h, vectors, root, damping).to(states.dtype)
        if k > 0:
            x, h, vectors, root = _step(steps, k - 1)
            basis = (x @ root).to(states.dtype)
        else:
            basis = sketch.expand(*states.shape[:-2], *sketch.shape)
        if k % 2 == 0:  # X = S basis
            left.append(grad_x)
            right.append(basis)
        else:  # X = S^T basis
            left.append(basis)
            right.append(grad_x)
        if k > 0:
            grad = (states.mT if k % 2 == 0 else states) @ (grad_x * shrink)
        if k == last:
            grad = grad + grad_u
    return (torch.cat(left, -1) * shrink) @ torch.cat(right, -1).mT


def _step(steps: Steps, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, h, V and M = (X^T X + c^2 I)^(-1/2) of one step, in float64."""
    h, vectors = steps.roots[..., k, :], steps.vectors[..., k, :, :]
    return steps.inputs[..., k, :, :].double(), h, vectors, inverse_root(h, vectors)


def power_of_two(states: Tensor) -> Tensor:
    """The power of two (..., 1, 1) that brings the largest entry of a state to [0.5, 1), so that no square overflows.

    The norm is scale-invariant, and the product with a power of two is exact. It is multiplied into the thin factor of
    each product with the state, so that no scaled copy of the state is made.
    """
    dims = (-2, -1)
    largest = torch.maximum(states.amax(dims, keepdim=True), -states.amin(dims, keepdim=True))
    limit = 120 if states.dtype == torch.float32 else 1000  # the power itself stays finite and normal
    exponent = torch.frexp(largest).exponent.clamp(-limit, limit)
    return torch.ldexp(torch.ones_like(largest), -exponent)


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


def damped_polar_backward(grad: Tensor, x: Tensor, h: Tensor, vectors: Tensor, root: Tensor, damping: float) -> Tensor:
    """dX = G M + 2 X (G_A + damping^2 tr(G_A) I), G_A = -V [sym(V^T X^T G V)_ij / (h_i h_j (h_i + h_j))] V^T.

    All in float64; `root` is M.
    """
    inverse = _reciprocal(h)
    e = vectors.mT @ (x.mT @ grad) @ vectors
    pair_sum = h[..., :, None] + h[..., None, :]
    weights = inverse[..., :, None] * inverse[..., None, :] / torch.where(pair_sum == 0, 1.0, pair_sum)
    inner = (e + e.mT) * weights  # -2 G_A in the basis V
    trace = inner.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    identity = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    # The part through c joins the r x r matrix: c^2 I commutes with V.
    grad_gram = vectors @ (inner + damping**2 * trace * identity) @ vectors.mT
    return grad @ root - x @ grad_gram


def _reciprocal(h: Tensor) -> Tensor:
    """1/h (..., r), and 0 where the whole matrix is zero (every h is): value and gradient are zero there."""
    is_zero = (h == 0).all(-1, keepdim=True)
    return torch.where(is_zero, 0.0, 1.0 / torch.where(is_zero, 1.0, h))
