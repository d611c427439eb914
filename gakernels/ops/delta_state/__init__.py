"""The state under the delta rule: each token replaces what the state says about its key, in part or whole."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gakernels.ops import autocast, checks
from gakernels.ops.context_state import check_arguments
from gakernels.ops.delta_state import eager, reference
from gakernels.ops.dispatch import choose
from gakernels.ops.registration import differentiate, operator

__all__ = ["delta_state"]


def delta_state(
    hidden: Tensor,
    a2: Tensor,
    b1: Tensor,
    strength: Tensor,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """States of a context: S_i = S_(i-1) + b_i (v_i - S_(i-1) k_i) k_i^T, token by token.

    Here v = A2 h is the value of a token, k = B1^T h / |B1^T h| its key, and b how much of what the state says about
    the key is replaced: with 1 the state then gives v for k, whatever it gave before, and with 0 it stays as it is.
    `context_state` adds v k^T instead. Schlag et al. 2021 (arXiv 2102.11174); in chunks as in Yang et al. 2024
    (arXiv 2406.06484).

    Args:
        hidden: (B, T, M, d_h), the inputs H_t of the decoder layer for T chunks of M tokens.
        a2: (d_r, d_h), the value projection A2.
        b1: (d_h, d_r), the key projection B1.
        strength: (B, T, M), b_i between 0 and 1, in float32 (float64 for float64 inputs). Values outside are not
            noticed; the state may grow without bound then.
        mask: (B, T, M) bool, False for tokens to leave out (padding); such tokens may hold any value.
        initial_state: (B, d_r, d_r), the state S_0 of what came before; zero if not given.

    Returns:
        (B, T, d_r, d_r): the states after each chunk, accumulated and returned in float32 (float64 for float64 inputs).

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    hidden, a2, b1 = autocast.cast(hidden.device, hidden, a2, b1)
    check_arguments(hidden, a2, b1, mask, initial_state)
    checks.check_shape("strength", strength, tuple(hidden.shape[:3]))
    checks.check_dtype("strength", strength, (eager.accumulator_dtype(hidden.dtype),))
    backend = choose("delta_state", hidden, a2, b1, strength, mask, initial_state).backend
    if backend == "reference":
        return reference.delta_state(hidden, a2, b1, strength, mask, initial_state)
    states: Tensor = _operator(hidden, a2, b1, strength, mask, initial_state, backend)[0]
    return states


@operator("delta_state")
def _operator(
    hidden: Tensor,
    a2: Tensor,
    b1: Tensor,
    strength: Tensor,
    mask: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, chunks, tokens, _ = hidden.shape
    state_size = a2.shape[0]
    states = hidden.new_empty((batch, chunks, state_size, state_size), dtype=strength.dtype)
    return states, hidden.new_empty(batch, chunks, tokens, 2 * state_size)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, a2, b1, strength, mask, initial_state, ctx.backend = inputs
    states, projected = output
    ctx.mark_non_differentiable(projected)
    ctx.set_materialize_grads(False)  # no zeros in place of the gradients of those
    ctx.needs = tuple(ctx.needs_input_grad[:3])
    ctx.has_initial_state = initial_state is not None
    ctx.save_for_backward(hidden, a2, b1, strength, mask, initial_state, states, projected)


def _backward(ctx: Any, grad_states: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_states is None:
        return (None,) * 7
    arguments = grad_states, *ctx.saved_tensors, ctx.needs
    # The eager form is plain operations, which torch.compile may fuse.
    run = eager.backward if ctx.backend == "eager" else lambda *given: _kernel_backward(*given, ctx.backend)
    needed = (*ctx.needs, True, ctx.has_initial_state)
    *grads, grad_initial = (grad if need else None for grad, need in zip(run(*arguments), needed, strict=True))
    return *grads, None, grad_initial, None


@operator("delta_state", "backward")
def _kernel_backward(
    grad_states: Tensor,
    hidden: Tensor,
    a2: Tensor,
    b1: Tensor,
    strength: Tensor,
    mask: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    projected: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    likes = zip((hidden, a2, b1, strength, states[:, 0]), (*needs, True, True), strict=True)
    grads = (like.new_empty(like.shape if needed else 0) for like, needed in likes)
    grad_hidden, grad_a2, grad_b1, grad_strength, grad_initial = grads
    return grad_hidden, grad_a2, grad_b1, grad_strength, grad_initial


differentiate("delta_state", _backward, _setup_context)
