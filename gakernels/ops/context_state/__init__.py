"""The running state of a context: S_t = S_{t-1} + A2 H_t^T H_t B1 (equation 3), all chunks at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.ops import autocast, checks
from gakernels.ops.context_state import eager, reference
from gakernels.ops.dispatch import choose
from gakernels.ops.registration import differentiate, operator

__all__ = ["context_state"]


def context_state(
    hidden: Tensor, a2: Tensor, b1: Tensor, mask: Tensor | None = None, initial_state: Tensor | None = None
) -> Tensor:
    """Inclusive prefix sums of the projected outer products of a context's hidden states.

    Args:
        hidden: (B, T, M, d_h), the inputs H_t of the decoder layer for T chunks of M tokens.
        a2: (d_r, d_h), the value projection A2.
        b1: (d_h, d_r), the key projection B1.
        mask: (B, T, M) bool, False for tokens to leave out (padding); such tokens may hold any value.
        initial_state: (B, d_r, d_r), the state S_0 of what came before; zero if not given.

    Returns:
        (B, T, d_r, d_r): the states S_1..S_T, accumulated and returned in float32 (float64 for float64 inputs).

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    check_arguments(hidden, a2, b1, mask, initial_state)
    hidden, a2, b1 = autocast.cast(hidden.device, hidden, a2, b1)
    backend = choose("context_state", hidden, a2, b1, mask, initial_state).backend
    if backend == "reference":
        return reference.context_state(hidden, a2, b1, mask, initial_state)
    states: Tensor = _operator(hidden, a2, b1, mask, initial_state, backend)[0]
    return states


def check_arguments(hidden: Tensor, a2: Tensor, b1: Tensor, mask: Tensor | None, initial_state: Tensor | None) -> None:
    """Raises: InputError: see `context_state`."""
    checks.check_shape("hidden", hidden, ("B", "T", "M", "d_h"))
    checks.check_dtype("hidden", hidden, checks.FLOATING)
    batch, chunks, tokens, hidden_size = hidden.shape
    if chunks == 0:
        raise InputError("hidden must have at least one chunk, but its shape is " + str(tuple(hidden.shape)))
    checks.check_shape("a2", a2, ("d_r", hidden_size))
    checks.check_shape("b1", b1, (hidden_size, a2.shape[0]))
    if not autocast.is_enabled(hidden.device):
        checks.check_same("hidden", hidden, a2=a2, b1=b1)
    if mask is not None:
        checks.check_shape("mask", mask, (batch, chunks, tokens))
        checks.check_dtype("mask", mask, (torch.bool,))
    if initial_state is not None:
        checks.check_shape("initial_state", initial_state, (batch, a2.shape[0], a2.shape[0]))
        checks.check_dtype("initial_state", initial_state, (eager.accumulator_dtype(hidden.dtype),))


@operator("context_state")
def _operator(
    hidden: Tensor,
    a2: Tensor,
    b1: Tensor,
    mask: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, chunks, tokens, _ = hidden.shape
    state_size = a2.shape[0]
    states = hidden.new_empty((batch, chunks, state_size, state_size), dtype=eager.accumulator_dtype(hidden.dtype))
    return states, hidden.new_empty(batch, chunks, tokens, 2 * state_size)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, a2, b1, mask, initial_state, ctx.backend = inputs
    projected = output[1]
    ctx.mark_non_differentiable(projected)
    ctx.set_materialize_grads(False)  # no zeros in place of the gradients of those
    ctx.needs = tuple(ctx.needs_input_grad[:3])
    ctx.has_initial_state = initial_state is not None
    ctx.save_for_backward(hidden, a2, b1, mask, projected)


def _backward(ctx: Any, grad_states: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_states is None:
        return None, None, None, None, None, None
    hidden, a2, b1, mask, projected = ctx.saved_tensors
    arguments = grad_states, hidden, a2, b1, mask, projected, ctx.needs
    # The eager form is plain operations, which torch.compile may fuse.
    grads = eager.backward(*arguments) if ctx.backend == "eager" else _kernel_backward(*arguments, ctx.backend)
    needed = (*ctx.needs, ctx.has_initial_state)
    grad_hidden, grad_a2, grad_b1, grad_initial = (g if need else None for g, need in zip(grads, needed, strict=True))
    return grad_hidden, grad_a2, grad_b1, None, grad_initial, None


@operator("context_state", "backward")
def _kernel_backward(
    grad_states: Tensor,
    hidden: Tensor,
    a2: Tensor,
    b1: Tensor,
    mask: Tensor | None,
    projected: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (
        hidden.new_empty(like.shape) if needed else grad_states.new_empty(0)
        for like, needed in zip((hidden, a2, b1), needs, strict=True)
    )
    grad_hidden, grad_a2, grad_b1 = grads
    return grad_hidden, grad_a2, grad_b1, grad_states.new_empty(grad_states[:, 0].shape)


differentiate("context_state", _backward, _setup_context)
