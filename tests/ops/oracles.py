"""Formulations of the operations that share no code with the library, states with known spectra, and measures."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import mpmath
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def draw(generator: Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def orthogonal(generator: Generator, size: int) -> Tensor:
    return torch.linalg.qr(draw(generator, size, size)).Q


def state_of(generator: Generator, singular_values: Tensor) -> Tensor:
    size = len(singular_values)
    return orthogonal(generator, size) @ torch.diag(singular_values.double()) @ orthogonal(generator, size).mT


def well_conditioned(generator: Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random matrices with singular values in [0.5, 1.5]: square Gaussian ones are now and then nearly singular."""
    p, s, qt = torch.linalg.svd(draw(generator, *shape), full_matrices=False)
    s = 0.5 + torch.rand(s.shape, generator=generator, dtype=torch.float64)
    return (p @ torch.diag_embed(s) @ qt).to(dtype)


def plain_states(
    hidden: Tensor, a2: Tensor, b1: Tensor, mask: Tensor | None = None, initial: Tensor | None = None
) -> Tensor:
    """S_t = S_0 + A2 (sum over the tokens up to chunk t of h h^T) B1, token by token."""
    rows = []
    for b in range(hidden.shape[0]):
        moment = hidden.new_zeros(hidden.shape[-1], hidden.shape[-1])
        chunks = []
        for t in range(hidden.shape[1]):
            for m in range(hidden.shape[2]):
                if mask is None or mask[b, t, m]:
                    moment = moment + torch.outer(hidden[b, t, m], hidden[b, t, m])
            state = a2 @ moment @ b1
            chunks.append(state if initial is None else state + initial[b])
        rows.append(torch.stack(chunks))
    return torch.stack(rows)


def svd_polar(x: Tensor, damping: float) -> Tensor:
    """f(X) = P diag(s / sqrt(s^2 + c^2)) Q^T for X = P diag(s) Q^T, c = damping ||X||_F; f(0) = 0."""
    p, s, qt = torch.linalg.svd(x, full_matrices=False)
    c = damping * torch.linalg.matrix_norm(x)[..., None]
    shifted = s.square() + c.square()
    return p @ torch.diag_embed(s / torch.where(shifted == 0, 1.0, shifted).sqrt()) @ qt


def svd_norm(states: Tensor, sketch: Tensor, damping: float, power_iterations: int = 1) -> Tensor:
    """norm(S) = u v^T by the definition, every f by SVD."""
    u = svd_polar(states @ sketch, damping)
    for _ in range(power_iterations):
        u = svd_polar(states @ svd_polar(states.mT @ u, damping), damping)
    return u @ svd_polar(states.mT @ u, damping).mT


def precise_norm_and_gradient(state: Tensor, sketch: Tensor, damping: float, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """norm(S) and the gradient of <upstream, norm(S)>, by central differences with 50 digits. One small state."""
    with mpmath.workdps(50):
        s, omega, tau, g = *(mpmath.matrix(x.tolist()) for x in (state, sketch)), mpmath.mpf(damping), upstream.tolist()
        size, step = s.rows, mpmath.mpf(10) ** -15

        def f(x: mpmath.matrix) -> mpmath.matrix:
            shift = tau**2 * sum(entry**2 for entry in x)
            values, vectors = mpmath.eigsy(x.T * x + shift * mpmath.eye(x.cols))
            return x * vectors * mpmath.diag([1 / mpmath.sqrt(value) for value in values]) * vectors.T

        def norm(s: mpmath.matrix) -> mpmath.matrix:
            u = f(s * f(s.T * f(s * omega)))
            return u * f(s.T * u).T

        gradient = torch.zeros(size, size, dtype=torch.float64)
        for i, j in product(range(size), range(size)):
            direction = mpmath.zeros(size)
            direction[i, j] = step
            change = norm(s + direction) - norm(s - direction)
            gradient[i, j] = float(sum(change[a, b] * g[a][b] for a in range(size) for b in range(size)) / (2 * step))
        value = torch.tensor([[float(x) for x in row] for row in norm(s).tolist()], dtype=torch.float64)
    return value, gradient


def released_norm(states: Tensor, sketch: Tensor) -> Tensor:
    """U V^T of `torch.svd_lowrank(S, q=r, niter=1)` with a given sketch."""
    q = torch.linalg.qr(states @ sketch).Q
    q = torch.linalg.qr(states.mT @ q).Q
    q = torch.linalg.qr(states @ q).Q
    u, _, vh = torch.linalg.svd(q.mT @ states, full_matrices=False)
    return q @ u @ vh


def plain_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, index: Sequence[int], bias: Tensor | None
) -> Tensor:
    """Every window through its own merged weight W + scale B_i A_i."""
    rows = []
    for window, i in zip(x, index, strict=True):
        merged = weight if i < 0 else weight + scale * lora_b[i] @ lora_a[i]
        rows.append(torch.stack([merged @ token for token in window]) + (0 if bias is None else bias))
    return torch.stack(rows)


def gradients(function: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of <upstream, function(*inputs)> with respect to every input, zero for one that plays no part."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    return torch.autograd.grad(function(*leaves), leaves, upstream, materialize_grads=True)


def relative(value: Tensor, target: Tensor) -> float:
    """||value - target|| / ||target|| in float64, NaN where the value is not finite."""
    target = target.double()
    return ((value.double() - target).norm() / target.norm()).item()


class SumsInOrder(TorchDispatchMode):
    """Every product of matrices adds its terms one after the other, in the dtype of its operands.

    So do the threads of a float32 GEMM on a GPU, but a library may cut the sum into parts, as many as suit the size and
    the device: then the error is smaller by about the root of their number, and no measure for a sum in one part.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.mm.default:
            return func(*args, **(kwargs or {}))
        left, right = args
        total = left.new_zeros(left.shape[0], right.shape[1])
        for k in range(left.shape[1]):
            total.addcmul_(left[:, k, None], right[k])
        return total


def assert_as_good_as(value: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """The error is at most `factor` times that of plain PyTorch in the same dtype (and a rounding of the result)."""
    allowed = factor * relative(plain, exact) + torch.finfo(value.dtype).eps
    assert relative(value, exact) <= allowed
