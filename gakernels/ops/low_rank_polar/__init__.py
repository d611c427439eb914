"""norm(S) = u v^T: rank-r singular directions of a state, all singular values one (equations 6-9), without an SVD."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.ops import checks
from gakernels.ops.dispatch import choose
from gakernels.ops.low_rank_polar import eager, reference
from gakernels.ops.low_rank_polar.precision import is_exact
from gakernels.ops.registration import differentiate, operator

__all__ = ["DEFAULT_DAMPING", "low_rank_polar"]

DEFAULT_DAMPING = 1e-3  # chosen in docs/numerics.md


def low_rank_polar(
    states: Tensor, sketch: Tensor, power_iterations: int = 1, damping: float = DEFAULT_DAMPING
) -> tuple[Tensor, Tensor]:
    """Low-rank polar factor of each state: with f the damped polar factor, u = f(S f(S^T f(S Omega))), v = f(S^T u).

    Smooth in S for damping > 0, for every rank; zero for a zero state; unchanged when S is scaled. The mathematics,
    its backward and the choice of the default damping are in docs/numerics.md.

    Args:
        states: (..., d_r, d_r), float32 or float64.
        sketch: (d_r, r), the fixed matrix Omega; it gets no gradient.
        power_iterations: passes of S S^T over the sketch, as `niter` of `torch.svd_lowrank`.
        damping: tau. 0 gives the exact polar factor (the SVD form), which is undefined (in practice not finite, or
            noise) for states of rank below r. Under 1e-3 float32 states are computed in float64 throughout, at its
            cost. On a GPU, plain PyTorch and the CUDA kernels use at least 2^-25, so that the result is finite.

    Returns:
        u, v: (..., d_r, r) each. Only the product u v^T is defined, not the basis.

    Raises:
        InputError: a shape, dtype, device or value does not fit.
    """
    _check(states, sketch, power_iterations, damping)
    backend = choose("low_rank_polar", states, sketch, power_iterations, damping).backend
    if backend == "reference":
        return reference.low_rank_polar(states, sketch, power_iterations, damping)
    u, v, *_ = _operator(states, sketch.detach(), power_iterations, damping, backend)
    return u, v


def _check(states: Tensor, sketch: Tensor, power_iterations: int, damping: float) -> None:
    if states.dim() < 2 or states.shape[-1] != states.shape[-2]:
        raise InputError(f"states must have shape (..., d_r, d_r), but it has {tuple(states.shape)}")
    checks.check_dtype("states", states, (torch.float32, torch.float64))
    checks.check_shape("sketch", sketch, (states.shape[-1], "r"))
    checks.check_same("states", states, sketch=sketch)
    if not 1 <= sketch.shape[1] <= sketch.shape[0]:
        raise InputError(f"sketch must have a rank r between 1 and d_r, but its shape is {tuple(sketch.shape)}")
    if power_iterations < 0:
        raise InputError(f"power_iterations must be at least 0, but it is {power_iterations}")
    if not 0 <= damping < math.inf:  # nor NaN
        raise InputError(f"damping must be finite and at least 0, but it is {damping}")


@operator("low_rank_polar")
def _operator(
    states: Tensor, sketch: Tensor, power_iterations: int, damping: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, (state_size, rank) = states.shape[:-2], sketch.shape
    count = 2 + 2 * power_iterations
    u, v = (states.new_empty(*batch, state_size, rank) for _ in range(2))
    exact = backend != "triton" and is_exact(states.dtype, damping)  # the Triton kernels have no float64 products
    inputs = states.new_empty((*batch, count, state_size, rank), dtype=torch.float64 if exact else states.dtype)
    transforms = states.new_empty((*batch, count, rank, rank), dtype=torch.float64)
    spectrum = rank if backend == "eager" and eager.uses_lapack(states.device) else 0
    roots = states.new_empty((*batch, spectrum), dtype=torch.float64)
    vectors = states.new_empty((*batch, spectrum, spectrum), dtype=torch.float64)
    return u, v, inputs, transforms, roots, vectors


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    states, sketch, _, ctx.damping, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # no zeros in place of the gradients of those
    ctx.save_for_backward(states, sketch, *output[2:])


def _backward(ctx: Any, grad_u: Tensor | None, grad_v: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_u is None and grad_v is None:
        return None, None, None, None, None
    states, sketch, *steps = ctx.saved_tensors
    zero = states.new_zeros(()).expand(*states.shape[:-1], sketch.shape[1])
    grad_u, grad_v = (zero if grad is None else grad for grad in (grad_u, grad_v))
    if ctx.backend == "eager":  # plain operations, which torch.compile may fuse
        grad = eager.backward(grad_u, grad_v, states, sketch, eager.Steps(*steps), ctx.damping)
    else:
        grad = _kernel_backward(grad_u, grad_v, states, sketch, steps, ctx.damping, ctx.backend)
    return grad, None, None, None, None


def _with_steps(*arguments: Any) -> tuple[Any, ...]:
    *tensors, steps, damping = arguments
    return *tensors, eager.Steps(*steps), damping


@operator("low_rank_polar", "backward", _with_steps)
def _kernel_backward(
    grad_u: Tensor,
    grad_v: Tensor,
    states: Tensor,
    sketch: Tensor,
    steps: Sequence[Tensor],
    damping: float,
    backend: str,
) -> Tensor:
    return states.new_empty(states.shape)


differentiate("low_rank_polar", _backward, _setup_context)
