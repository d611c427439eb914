"""`context_state` in Triton kernels, with the large products by cuBLAS, as docs/context_state.md describes them.

What is saved for the backward is what `eager` saves: the masked projections.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from gakernels.ops import autocast, launching, tuned
from gakernels.ops.context_state import kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(
    hidden: Tensor, a2: Tensor, b1: Tensor, mask: Tensor | None = None, initial_state: Tensor | None = None
) -> str | None:
    """Why the kernels can't run these arguments here, or None if they can. They take any sizes and strides."""
    if hidden.dtype not in DTYPES:
        return f"the kernels compute in float32, but hidden is {hidden.dtype}"
    if a2.shape[0] == 0:
        return "the state has no entries"
    return launching.obstacle(hidden.device)


@autocast.without
def forward(
    hidden: Tensor, a2: Tensor, b1: Tensor, mask: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns states (B, T, d_r, d_r) and the masked projections [P | Q] (B, T, M, 2 d_r) that the backward needs."""
    state_size = a2.shape[0]
    projected = hidden.new_empty(*hidden.shape[:3], 2 * state_size)
    tokens, rows = hidden.flatten(0, 2), projected.flatten(0, 2)
    torch.mm(tokens, a2.mT, out=rows[:, :state_size])  # two products into the halves: nothing is copied to stack A2, B1
    torch.mm(tokens, b1, out=rows[:, state_size:])
    if mask is not None:
        _clear_left_out(rows, mask)
    return _prefix_states(projected, initial_state), projected


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
    needs_hidden, needs_a2, needs_b1 = needs
    state_size, tokens = a2.shape[0], hidden.flatten(0, 2)
    suffix, scales, grad_initial = _suffix_gradients(grad_states, projected.dtype)
    grad_projected = torch.empty_like(projected)
    if needs_hidden or needs_a2:
        _write_projection_gradient(grad_projected, projected, suffix, scales, mask, of_values=True)
    if needs_hidden or needs_b1:
        _write_projection_gradient(grad_projected, projected, suffix, scales, mask, of_values=False)
    rows = grad_projected.flatten(0, 2)
    grad_hidden = (rows @ torch.cat([a2, b1.mT])).view(hidden.shape) if needs_hidden else None
    if mask is not None and (needs_a2 or needs_b1):  # a token that is left out may hold anything, even NaN
        tokens = tokens.masked_fill(~mask.reshape(-1, 1), 0)
    grad_a2 = rows[:, :state_size].mT @ tokens if needs_a2 else None
    grad_b1 = tokens.mT @ rows[:, state_size:] if needs_b1 else None
    return grad_hidden, grad_a2, grad_b1, grad_initial


def _clear_left_out(rows: Tensor, mask: Tensor) -> None:
    """Zeros over the rows (tokens, 2 d_r) that the mask leaves out; the others are not touched."""
    tokens, width = rows.shape
    options = _settings(kernels.clear_left_out, rows)
    grid = (triton.cdiv(tokens, options["BLOCK_M"]), triton.cdiv(width, options["BLOCK_N"]))
    launching.launch(kernels.clear_left_out, grid, rows, mask.contiguous(), tokens, width, **options)


def _prefix_states(projected: Tensor, initial_state: Tensor | None) -> Tensor:
    """All S_t (B, T, d_r, d_r) in float32."""
    batch, chunks, tokens, width = projected.shape
    state_size = width // 2
    states = projected.new_empty(batch, chunks, state_size, state_size, dtype=torch.float32)
    initial = None if initial_state is None else initial_state.contiguous()
    options = _settings(kernels.prefix_states, projected, rows=batch, state=state_size, aligned=_aligned(state_size))
    tiles = triton.cdiv(state_size, options["BLOCK_P"]) * triton.cdiv(state_size, options["BLOCK_Q"])
    launching.launch(
        kernels.prefix_states,
        (batch * tiles,),
        *(projected, initial, states, chunks, tokens, state_size),
        HAS_INITIAL=initial is not None,
        PRECISION=_precision(projected.dtype),
        **options,
    )
    return states


def _suffix_gradients(grad_states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """All R_t in a dtype, divided by scales (B, T) for float16, which has a small range, and R_1 in float32."""
    batch, chunks, state_size, _ = grad_states.shape
    suffix = grad_states.new_empty(grad_states.shape, dtype=dtype)
    grad_initial = grad_states.new_empty(batch, state_size, state_size)
    largest = scales = None
    if dtype == torch.float16:
        largest = torch.linalg.vector_norm(grad_states, float("inf"), dim=(-2, -1))
        scales = torch.empty_like(largest)
    options = _settings(kernels.suffix_gradients, suffix)
    tiles = triton.cdiv(state_size, options["BLOCK_P"]) * triton.cdiv(state_size, options["BLOCK_Q"])
    launching.launch(
        kernels.suffix_gradients,
        (batch * tiles,),
        *(grad_states, largest, suffix, scales, grad_initial, chunks, state_size, *grad_states.stride()),
        SCALED=scales is not None,
        **options,
    )
    return suffix, scales, grad_initial


def _write_projection_gradient(
    grad_projected: Tensor,
    projected: Tensor,
    suffix: Tensor,
    scales: Tensor | None,
    mask: Tensor | None,
    of_values: bool,
) -> None:
    """Write dP, or else dQ, to its half of grad_projected (B, T, M, 2 d_r)."""
    batch, chunks, tokens, width = projected.shape
    state_size = width // 2
    options = _settings(kernels.projection_gradient, projected, state=state_size, aligned=_aligned(state_size))
    tiles = triton.cdiv(tokens, options["BLOCK_M"]) * triton.cdiv(state_size, options["BLOCK_N"])
    launching.launch(
        kernels.projection_gradient,
        (batch * chunks * tiles,),
        *(projected, suffix, scales, None if mask is None else mask.contiguous(), grad_projected, tokens, state_size),
        OF_VALUES=of_values,
        SCALED=scales is not None,
        HAS_MASK=mask is not None,
        PRECISION=_precision(projected.dtype),
        **options,
    )


def _settings(kernel: Any, tensor: Tensor, **sizes: int) -> dict[str, int]:
    return tuned.settings(f"context_state.{kernel.fn.__name__}", tensor.device, tensor.dtype, **sizes)


def _aligned(state_size: int) -> int:
    """Whether rows of the states start at multiples of 16 elements: only then are they copied asynchronously."""
    return int(state_size % 16 == 0)


def _precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: as TF32 where PyTorch may, else as three products of TF32 parts."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
