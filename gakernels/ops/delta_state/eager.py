"""`delta_state` in plain PyTorch: matrix products over whole chunks, in the WY form of Yang et al. 2024.

Within a chunk the rows of X are what the tokens write: x_i = b_i (v_i - S_(i-1) k_i). They solve

    (I + A) X = diag(b) E,  A = strictly lower part of diag(b) K K^T,  E = V - K S_0^T,  and  S = S_0 + X^T K.

So everything but the products with the state is parallel over the chunks. |(I + A)^-1| has no entry above 1 for unit
keys and b in [0, 1], so the inverse may be formed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gakernels.ops import autocast
from gakernels.ops.context_state.eager import accumulator_dtype, projection_gradients

__all__ = ["accumulator_dtype", "backward", "forward", "unit_lower_inverse"]

BLOCK = 32  # size up to which inverses are solved for; larger ones are products of these
SMALLEST = 1e-12  # norm of a key below which it is not scaled up to 1, as in `torch.nn.functional.normalize`


@autocast.without
def forward(
    hidden: Tensor, a2: Tensor, b1: Tensor, strength: Tensor, mask: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns states (B, T, d_r, d_r) and the masked projections [V | B1^T h] (B, T, M, 2 d_r), for the backward."""
    projected = F.linear(hidden, torch.cat([a2, b1.mT]))
    if mask is not None:
        projected.masked_fill_(~mask[..., None], 0)
        strength = strength.masked_fill(~mask, 0)
    values, keys, _ = _values_and_keys(projected, strength.dtype)
    inverse, _ = _inverse(keys, strength)
    writing = inverse * strength[..., None, :]
    states = values.new_empty(*values.shape[:2], a2.shape[0], a2.shape[0])
    state = torch.zeros_like(states[:, 0]) if initial_state is None else initial_state
    for t in range(states.shape[1]):
        written = writing[:, t] @ (values[:, t] - keys[:, t] @ state.mT)
        state = torch.baddbmm(state, written.mT, keys[:, t])
        states[:, t] = state
    return states, projected


@autocast.without
def backward(
    grad_states: Tensor,
    hidden: Tensor,
    a2: Tensor,
    b1: Tensor,
    strength: Tensor,
    mask: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    projected: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of hidden, a2, b1 (None where not needed), strength and the initial state."""
    if mask is not None:
        strength = strength.masked_fill(~mask, 0)
    *of_projected, grad_strength, grad_initial = _update_gradients(
        grad_states, strength, initial_state, states, projected
    )
    grad_projected = torch.cat(of_projected, dim=-1).to(hidden.dtype)
    if mask is not None:
        grad_projected = grad_projected.masked_fill(~mask[..., None], 0)
        grad_strength = grad_strength.masked_fill(~mask, 0)
    return *projection_gradients(grad_projected, hidden, a2, b1, mask, needs), grad_strength, grad_initial


def _update_gradients(
    grad_states: Tensor, strength: Tensor, initial_state: Tensor | None, states: Tensor, projected: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the values, of the keys before they are scaled to norm 1, of strength and the initial state.

    With G the gradient of the state after a chunk, X = (I + A)^-1 Y and Y = diag(b) E:

        dX = K G^T,  dY = (I + A)^-T dX,  dA = -dY X^T,  dE = diag(b) dY = dV,  dS_0 = G - dE^T K,
        db = rows of dY * E + rows of dA * K K^T,  dK = X G - dE S_0 + (diag(b) dA + its transpose) K.
    """
    values, keys, norms = _values_and_keys(projected, strength.dtype)
    inverse, gram = _inverse(keys, strength)
    first = torch.zeros_like(states[:, 0]) if initial_state is None else initial_state
    before = torch.cat([first[:, None], states[:, :-1]], dim=1)
    errors = values - keys @ before.mT
    written = inverse @ (strength[..., None] * errors)

    grad = torch.zeros_like(first)
    after, grad_scaled = torch.empty_like(before), torch.empty_like(errors)  # G and dY of all chunks
    for t in range(states.shape[1] - 1, -1, -1):
        grad = grad + grad_states[:, t]
        after[:, t], grad_scaled[:, t] = grad, inverse[:, t].mT @ (keys[:, t] @ grad.mT)
        grad = torch.baddbmm(grad, (strength[:, t, :, None] * grad_scaled[:, t]).mT, keys[:, t], alpha=-1)

    grad_errors = strength[..., None] * grad_scaled
    grad_lower = torch.tril(grad_scaled @ written.mT, -1).neg_()
    grad_strength = (grad_scaled * errors).sum(-1) + (grad_lower * gram).sum(-1)
    grad_gram = strength[..., None] * grad_lower
    grad_keys = written @ after - grad_errors @ before + (grad_gram + grad_gram.mT) @ keys
    along = torch.linalg.vecdot(grad_keys, keys)[..., None]
    grad_raw = torch.where(norms > SMALLEST, grad_keys - along * keys, grad_keys) / norms.clamp(min=SMALLEST)
    return grad_errors, grad_raw, grad_strength, grad


def _values_and_keys(projected: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """V, the keys scaled to norm 1, and their norms (..., 1) before."""
    values, raw = projected.to(dtype).chunk(2, dim=-1)
    norms = torch.linalg.vector_norm(raw, dim=-1, keepdim=True)
    return values, raw / norms.clamp(min=SMALLEST), norms


def _inverse(keys: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """(I + A)^-1 (B, T, M, M) and K K^T."""
    gram = keys @ keys.mT
    return unit_lower_inverse(strength[..., None] * gram), gram


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 of the strictly lower part L of matrices (..., n, n); what else they hold is not read.

    Blocks on the diagonal are inverted and joined two by two: [[P, 0], [R, Q]]^-1 = [[P', 0], [-Q' R P', Q']]. On a GPU
    these are few batched products; solving for the whole inverse goes matrix by matrix there.
    """
    size = BLOCK
    while size < lower.shape[-1]:
        size *= 2
    padding = size - lower.shape[-1]
    lower = F.pad(lower, (0, padding, 0, padding))
    identity = torch.eye(BLOCK, dtype=lower.dtype, device=lower.device)
    found = torch.linalg.solve_triangular(
        _diagonal_blocks(lower, BLOCK).tril(-1) + identity, identity, upper=False, unitriangular=True
    )
    while found.shape[-1] < size:
        half = found.shape[-1]
        above, below = found[..., ::2, :, :], found[..., 1::2, :, :]
        corner = -below @ _diagonal_blocks(lower, 2 * half)[..., half:, :half] @ above
        found = torch.cat([F.pad(above, (0, half)), torch.cat([corner, below], dim=-1)], dim=-2)
    end = size - padding
    return found[..., 0, :end, :end]


def _diagonal_blocks(matrices: Tensor, size: int) -> Tensor:
    """(..., n, n) -> (..., n / size, size, size)."""
    blocks = matrices.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
