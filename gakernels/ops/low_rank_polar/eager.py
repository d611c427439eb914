"""`low_rank_polar` in plain PyTorch: tall GEMMs with S, and r x r matrices in float64; at a small damping all of it.

Only the product u v^T is defined, so every step but the last may use any W with W W^T = (X^T X + c^2 I)^(-1): a
Cholesky factor, which costs a fraction of an eigendecomposition. The last step needs the symmetric root: from
eigenvectors on a CPU (spectrum.py), and from shifted inverses, all at once, elsewhere (shifted_inverses.py). The
derivations are in docs/numerics.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gakernels.ops import autocast
from gakernels.ops.low_rank_polar import shifted_inverses, spectrum
from gakernels.ops.low_rank_polar.precision import is_exact

LEAST_DAMPING = 2.0**-25  # without LAPACK; c^2 is then eight roundings of tr(X^T X), and every pivot is positive


class Steps(NamedTuple):
    """What the damped polar steps X -> X W leave for the backward; K steps stacked after the batch dimensions.

    Without an eigendecomposition, as everywhere but in plain PyTorch on a CPU, `roots` and `vectors` are empty.
    """

    inputs: Tensor  # (..., K, d_r, r): X, in the dtype of the states, or float64 (precision.py)
    transforms: Tensor  # (..., K, r, r) float64: W; the symmetric root M in the last step
    roots: Tensor  # (..., r) float64: h, the square roots of the eigenvalues of X^T X + c^2 I in the last step
    vectors: Tensor  # (..., r, r) float64: its eigenvectors V


def sizes(states: Tensor, sketch: Tensor, power_iterations: int = 1, damping: float = 1e-3) -> dict[str, int]:
    """What the speed of a call depends on."""
    batch = states.shape[:-2].numel()
    return {"batch": batch, "state": states.shape[-1], "rank": sketch.shape[1], "power_iterations": power_iterations}


def uses_lapack(device: torch.device) -> bool:
    """Whether LAPACK does the r x r work, eigenvectors included: the faster form on a CPU. Elsewhere it would wait.

    Meta tensors count as being on a CPU.
    """
    return device.type in ("cpu", "meta")


@autocast.without
def forward(states: Tensor, sketch: Tensor, power_iterations: int, damping: float) -> tuple[Tensor, Tensor, Steps]:
    """Returns u, v (..., d_r, r) and the steps: S Omega, then S^T and S in turn, K = 2 + 2 power_iterations in all."""
    dtype = states.dtype
    if not uses_lapack(states.device):
        damping = max(damping, LEAST_DAMPING)
    if is_exact(dtype, damping):
        states, sketch = states.double(), sketch.double()
    shrink = power_of_two(states)
    inputs, transforms = [], []
    basis, previous = sketch, sketch
    last = 1 + 2 * power_iterations
    for step in range(last + 1):
        x = (states if step % 2 == 0 else states.mT) @ (basis * shrink)
        wide = x.double()
        if step < last:
            w = inverse_factor(wide, damping)
        else:
            w, h, vectors = inverse_root(wide, damping, dtype)
        inputs.append(x)
        transforms.append(w)
        previous, basis = basis, (wide @ w).to(x.dtype)
    steps = Steps(torch.stack(inputs, -3), torch.stack(transforms, -3), h, vectors)
    return previous.to(dtype), basis.to(dtype), steps


@autocast.without
def backward(grad_u: Tensor, grad_v: Tensor, states: Tensor, sketch: Tensor, steps: Steps, damping: float) -> Tensor:
    """Gradient of the states. The steps are undone from the last; all outer products form one GEMM at the end."""
    dtype = states.dtype
    if _is_without_eigenvectors(steps):
        damping = max(damping, LEAST_DAMPING)
    if is_exact(dtype, damping):
        states, sketch = states.double(), sketch.double()
    shrink = power_of_two(states)
    left, right = [], []  # dS = sum of left right^T
    last = steps.inputs.shape[-3] - 1
    grad_x = symmetric_step_backward(grad_v.double(), steps, damping, dtype).to(states.dtype)
    for k in range(last, -1, -1):
        if k > 0:
            x, w = _step(steps, k - 1)
            y = x @ w
            basis = y.to(states.dtype)
        else:
            basis = sketch.expand(*states.shape[:-2], *sketch.shape)
        left.append(grad_x if k % 2 == 0 else basis)  # X = S basis, or X = S^T basis
        right.append(basis if k % 2 == 0 else grad_x)
        if k > 0:
            grad = (states.mT if k % 2 == 0 else states) @ (grad_x * shrink)
            if k == last:
                grad = grad + grad_u
            grad_x = triangular_step_backward(grad.double(), x, y, w, damping).to(states.dtype)
    return ((torch.cat(left, -1) * shrink) @ torch.cat(right, -1).mT).to(dtype)


def _step(steps: Steps, k: int) -> tuple[Tensor, Tensor]:
    """X and W of one step, in float64."""
    return steps.inputs[..., k, :, :].double(), steps.transforms[..., k, :, :]


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


def gram(x: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """X^T X with zeros for an X that is not finite, c^2 = damping^2 ||X||_F^2 (..., 1), and which X is not finite.

    The Gram matrix squares the spectrum, which float32 can't hold over more than about 3 decades; float64 can.
    """
    product = x.mT @ x
    broken = ~product.isfinite().all(-1).all(-1)[..., None, None]
    shift = damping**2 * product.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    return torch.where(broken, 0.0, product), shift, broken


def inverse_factor(x: Tensor, damping: float) -> Tensor:
    """W = L^(-T) (..., r, r) with L L^T = X^T X + c^2 I, upper triangular, so that W W^T is the inverse of that.

    Zero for X = 0. NaN where X is not finite, or the shifted matrix is not numerically positive definite, which only a
    damping near zero can leave: not an error, as elsewhere in PyTorch.
    """
    product, shift, broken = gram(x, damping)
    is_zero = (product.diagonal(dim1=-2, dim2=-1).sum(-1) == 0)[..., None, None]  # or not finite
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    shifted = product + torch.where(is_zero, 1.0, shift[..., None]) * identity
    factor, info = torch.linalg.cholesky_ex(shifted)
    if uses_lapack(x.device):
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False).mT
    else:
        inverse = shifted_inverses.triangular_inverse(factor).mT
    failed = broken | (info != 0)[..., None, None]
    return torch.where(failed, torch.nan, torch.where(is_zero, 0.0, inverse))


def triangular_step_backward(grad: Tensor, x: Tensor, y: Tensor, w: Tensor, damping: float) -> Tensor:
    """dX of Y = X W, W = L^(-T): dX = (G - 2 Y s) W^T + 2 damping^2 tr(G_A) X, G_A = -W s W^T, s = sym(Phi(G^T Y)).

    Phi keeps the lower triangle and half of the diagonal. All in float64. G is overwritten.
    """
    lower = (grad.mT @ y).tril()
    twice_s = lower + lower.mT
    diagonal = twice_s.diagonal(dim1=-2, dim2=-1)
    diagonal.mul_(0.5)
    trace = -0.5 * (w @ twice_s * w).sum((-2, -1), keepdim=True)  # of G_A
    return (grad.sub_(y @ twice_s) @ w.mT).addcmul_(x, 2 * damping**2 * trace)


def inverse_root(x: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """M = (X^T X + c^2 I)^(-1/2), and h and V of `Steps`, or empty ones. `dtype` is that of the states.

    Zero for X = 0; NaN for an X that is not finite: not an error, as elsewhere in PyTorch.
    """
    product, shift, broken = gram(x, damping)
    if uses_lapack(x.device):
        h, vectors = spectrum.shifted_spectrum(product, shift)
        return spectrum.inverse_root(h, vectors), h, vectors
    root = shifted_inverses.inverse_root(product, damping, dtype)
    batch = root.shape[:-2]
    return torch.where(broken, torch.nan, root), root.new_empty(*batch, 0), root.new_empty(*batch, 0, 0)


def symmetric_step_backward(grad: Tensor, steps: Steps, damping: float, dtype: torch.dtype) -> Tensor:
    """dX = G M + 2 X (G_A + damping^2 tr(G_A) I) of the last step, in float64. `dtype` is that of the states."""
    x, root = _step(steps, steps.inputs.shape[-3] - 1)
    e = x.mT @ grad
    if _is_without_eigenvectors(steps):
        product, _, broken = gram(x, damping)
        gradient = shifted_inverses.root_gradient(e, product, damping, dtype)
        gradient = torch.where(broken, torch.nan, gradient)
    else:
        gradient = spectrum.root_gradient(e, steps.roots, steps.vectors)  # -2 G_A
    trace = gradient.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    return grad @ root - x @ (gradient + damping**2 * trace * identity)


def _is_without_eigenvectors(steps: Steps) -> bool:
    return steps.roots.shape[-1] == 0
