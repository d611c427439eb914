"""`context_state` in plain PyTorch: one GEMM for both projections, prefix sums in place.

Bytes: the projections P | Q (2 M d_r a chunk) are saved for the backward; recomputing them would cost the GEMM again,
2 M d_h (2 d_r) operations, to save 4 M d_r bytes in bf16. The hidden states, M d_h numbers, are kept anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gakernels.ops import autocast


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """States are float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sizes(
    hidden: Tensor, a2: Tensor, b1: Tensor, mask: Tensor | None = None, initial_state: Tensor | None = None
) -> dict[str, int]:
    """What the speed of a call depends on."""
    batch, chunks, tokens, hidden_size = hidden.shape
    return {"batch": batch * chunks, "tokens": tokens, "hidden": hidden_size, "state": a2.shape[0]}


@autocast.without
def forward(
    hidden: Tensor, a2: Tensor, b1: Tensor, mask: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns states (B, T, d_r, d_r) and the masked projections [P | Q] (B, T, M, 2 d_r) that the backward needs."""
    projected = F.linear(hidden, torch.cat([a2, b1.mT]))
    if mask is not None:
        projected.masked_fill_(~mask[..., None], 0)
    values, keys = projected.to(accumulator_dtype(hidden.dtype)).chunk(2, dim=-1)
    states = values.mT @ keys
    if initial_state is not None:
        states[:, 0] += initial_state
    for t in range(1, states.shape[1]):
        states[:, t] += states[:, t - 1]
    return states, projected


@autocast.without
def backward(
    grad_states: Tensor,
    hidden: Tensor,
    a2: Tensor,
    b1: Tensor,
    mask: Tensor | None,
    projected: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of hidden, a2, b1 (None where not needed) and of the initial state.

    With R_t the suffix sum of the upstream gradients: dP_t = Q_t R_t^T, dQ_t = P_t R_t, dH = dP A2 + dQ B1^T,
    dA2 = dP^T H, dB1 = H^T dQ, dS_0 = R_1.
    """
    values, keys = projected.to(grad_states.dtype).chunk(2, dim=-1)
    suffix = grad_states.clone(memory_format=torch.contiguous_format)
    for t in range(suffix.shape[1] - 2, -1, -1):
        suffix[:, t] += suffix[:, t + 1]
    grad_values, grad_keys = keys @ suffix.mT, values @ suffix
    grad_projected = torch.cat([grad_values, grad_keys], dim=-1).to(hidden.dtype)
    if mask is not None:
        grad_projected = grad_projected.masked_fill(~mask[..., None], 0)
    return *projection_gradients(grad_projected, hidden, a2, b1, mask, needs), suffix[:, 0]


def projection_gradients(
    grad_projected: Tensor,
    hidden: Tensor,
    a2: Tensor,
    b1: Tensor,
    mask: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, a2 and b1 (None where not needed) from those of the masked projections (B, T, M, 2 d_r)."""
    grad_hidden = grad_projected @ torch.cat([a2, b1.mT]) if needs[0] else None
    grad_a2 = grad_b1 = None
    if needs[1] or needs[2]:
        if mask is not None:  # a token that is left out may hold anything, even NaN
            hidden = hidden.masked_fill(~mask[..., None], 0)
        grad_stacked = grad_projected.flatten(0, 2).mT @ hidden.flatten(0, 2)
        grad_a2, grad_b1 = grad_stacked[: a2.shape[0]], grad_stacked[a2.shape[0] :].mT
    return grad_hidden, grad_a2 if needs[1] else None, grad_b1 if needs[2] else None
