"""The plain definition of `delta_state`, token by token: any dtype, any device. The oracle of its tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gakernels.ops import autocast
from gakernels.ops.context_state.eager import accumulator_dtype


@autocast.without
def delta_state(
    hidden: Tensor,
    a2: Tensor,
    b1: Tensor,
    strength: Tensor,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """S_i = S_(i-1) + b_i (v_i - S_(i-1) k_i) k_i^T, with masked tokens left out."""
    dtype = accumulator_dtype(hidden.dtype)
    if mask is not None:
        hidden, strength = hidden.masked_fill(~mask[..., None], 0), strength.masked_fill(~mask, 0)
    values, keys = (hidden @ a2.mT).to(dtype), F.normalize((hidden @ b1).to(dtype), dim=-1)
    state = values.new_zeros(len(hidden), a2.shape[0], a2.shape[0]) if initial_state is None else initial_state
    states = []
    for chunk in range(hidden.shape[1]):
        for i in range(hidden.shape[2]):
            v, k, b = values[:, chunk, i, :, None], keys[:, chunk, i, :, None], strength[:, chunk, i, None, None]
            state = state + b * (v - state @ k) @ k.mT
        states.append(state)
    return torch.stack(states, 1)
