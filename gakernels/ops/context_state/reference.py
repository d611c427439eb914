"""The plain definition of `context_state`: any dtype, any device. The oracle of its tests."""

import torch
from torch import Tensor

from gakernels.ops import autocast
from gakernels.ops.context_state.eager import accumulator_dtype


@autocast.without
def context_state(
    hidden: Tensor, a2: Tensor, b1: Tensor, mask: Tensor | None = None, initial_state: Tensor | None = None
) -> Tensor:
    """S_t = S_{t-1} + (H_t A2^T)^T (H_t B1), equation 3 of the paper, with masked tokens left out."""
    dtype = accumulator_dtype(hidden.dtype)
    if mask is not None:
        hidden = hidden.masked_fill(~mask[..., None], 0)
    values, keys = hidden @ a2.mT, hidden @ b1
    states = torch.cumsum(values.to(dtype).mT @ keys.to(dtype), dim=1)
    return states if initial_state is None else states + initial_state[:, None]
