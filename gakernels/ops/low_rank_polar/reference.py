"""The plain definition of `low_rank_polar` (docs/numerics.md), differentiated by autograd. The oracle of its tests."""

import torch
from torch import Tensor

from gakernels.ops import autocast


@autocast.without
def low_rank_polar(
    states: Tensor, sketch: Tensor, power_iterations: int = 1, damping: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """u = f(S f(S^T f(S Omega))), v = f(S^T u), computed in float64, returned in the dtype of the states."""
    state, basis = states.double(), sketch.double()
    left = damped_polar(state @ basis, damping)
    for _ in range(power_iterations):
        left = damped_polar(state @ damped_polar(state.mT @ left, damping), damping)
    right = damped_polar(state.mT @ left, damping)
    return left.to(states.dtype), right.to(states.dtype)


def damped_polar(x: Tensor, damping: float) -> Tensor:
    """f(X) = X (X^T X + c^2 I)^(-1/2) with c = damping * ||X||_F, and f(0) = 0."""
    size = x.square().sum((-2, -1), keepdim=True)
    is_zero = size == 0
    x = x / torch.where(is_zero, 1.0, size).sqrt()
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    shifted = torch.where(is_zero, identity, x.mT @ x + damping**2 * identity)
    return torch.where(is_zero, 0.0, x @ inverse_square_root(shifted))


def inverse_square_root(a: Tensor, iterations: int = 60, tolerance: float = 1e-14) -> Tensor:
    """A^(-1/2) of symmetric positive definite matrices by the Denman-Beavers iteration (Higham 2008, eq. 6.28).

    Only sums and inverses, so that automatic differentiation through it is right for repeated eigenvalues too.
    """
    root, inverse = a, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    for _ in range(iterations):
        root, inverse, previous = (root + inverse.inverse()) / 2, (inverse + root.inverse()) / 2, inverse
        if ((inverse - previous).norm() <= tolerance * inverse.norm()).item():
            break
    return inverse
