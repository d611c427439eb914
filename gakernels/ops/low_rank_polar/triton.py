"""`low_rank_polar` as Triton kernels (kernels.py): the launches and the memory between them.

The algorithm is that of eager.py, with two differences. The symmetric inverse square root of the last step is a sum of
shifted inverses, all found at once, with the best poles for the spectrum that the damping allows; and the power of two
multiplies the tiles of the state. docs/low_rank_polar.md has the operation counts.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from gakernels.ops import launching, tuned
from gakernels.ops.low_rank_polar import kernels
from gakernels.ops.low_rank_polar.eager import Steps
from gakernels.ops.low_rank_polar.poles import inverse_root_poles

LARGEST_RANK = 128
LARGEST_DAMPING = 1e6  # the kernels take it as float32, and use its square
PROGRAMS = 132  # that a Hopper GPU runs at once: one on each multiprocessor
ROOT_ERROR = 3e-8  # of the inverse square root, relative: below the rounding of float32
LARGEST_CONDITION = 1e13  # that a Gram matrix in float64 may have, where the damping sets no lower bound
OF_RANK = ("BLOCK", "COLUMNS", "CHUNK")  # settings that cut up the padded rank


def unsupported(states: Tensor, sketch: Tensor, power_iterations: int = 1, damping: float = 1e-3) -> str | None:
    """Why these kernels can't run these arguments, or None if they can."""
    if states.dtype != torch.float32:
        return f"its Triton kernels take float32 states, but these are {states.dtype}"
    if sketch.shape[1] > LARGEST_RANK:
        return f"its Triton kernels take a rank of at most {LARGEST_RANK}, but it is {sketch.shape[1]}"
    if damping > LARGEST_DAMPING:
        return f"its Triton kernels take a damping of at most {LARGEST_DAMPING:g}, but it is {damping:g}"
    return launching.obstacle(states.device)


def forward(states: Tensor, sketch: Tensor, power_iterations: int, damping: float) -> tuple[Tensor, Tensor, Steps]:
    """Returns u, v (..., d_r, r) and the steps, as eager.forward; `roots` and `vectors` of the steps are empty."""
    call = _Call(states, sketch, damping)
    count, tall, small = 2 + 2 * power_iterations, (call.n, call.r), (call.r, call.r)
    inputs = states.new_empty(call.batch, count, *tall)
    transforms = states.new_empty((call.batch, count, *small), dtype=torch.float64)
    between, u, v = (states.new_empty(call.batch, *tall) for _ in range(3))
    y = sketch.contiguous().expand(call.batch, *tall)
    for k in range(count):
        x, w = inputs[:, k], transforms[:, k]
        gram = call.state_product(k % 2 == 1, y, x, other=x)
        if k < count - 1:
            call.cholesky_transform(gram, w)
        else:
            call.inverse_root(gram, w)
        y = v if k == count - 1 else u if k == count - 2 else between
        call.transformed(x, w, y)
    batch = states.shape[:-2]
    empty = transforms.new_empty(*batch, 0), transforms.new_empty(*batch, 0, 0)
    steps = Steps(inputs.view(*batch, count, *tall), transforms.view(*batch, count, *small), *empty)
    return u.view(*batch, *tall), v.view(*batch, *tall), steps


def backward(grad_u: Tensor, grad_v: Tensor, states: Tensor, sketch: Tensor, steps: Steps, damping: float) -> Tensor:
    """Gradient of the states, as eager.backward: the steps are undone from the last, then one product forms it."""
    call = _Call(states, sketch, damping)
    count, tall = steps.inputs.shape[-3], (call.n, call.r)
    inputs = steps.inputs.reshape(call.batch, count, *tall)
    transforms = steps.transforms.reshape(call.batch, count, call.r, call.r)
    grad_u, grad_v = (grad.reshape(call.batch, *tall).contiguous() for grad in (grad_u, grad_v))
    bases, grads = torch.empty_like(inputs), torch.empty_like(inputs)  # Y_(k-1), and the gradients of X_k
    bases[:, 0] = sketch
    call.transformed(inputs[:, :-1], transforms[:, :-1], bases[:, 1:])

    last = count - 1
    grad_gram = call.root_gradient(inputs[:, last], grad_v)
    call.step_gradient(grad_v, transforms[:, last], inputs[:, last], grad_gram, grads[:, last])
    grad = torch.empty_like(grad_v)
    for k in range(last - 1, -1, -1):
        w = transforms[:, k]
        extra = grad_u if k == last - 1 else None
        product = call.state_product(k % 2 == 1, grads[:, k + 1], grad, other=bases[:, k + 1], extra=extra)
        call.step_gradient(grad, w, inputs[:, k], call.factor_gradient(product, w), grads[:, k])
    return call.outer_products(grads, bases).view(states.shape)


class _Call:
    """The launches of one call: B states (n, n), tall matrices (B, n, r) and small ones, padded to a rank R.

    A tall matrix may be a slice of a larger tensor along its first dimension, and is row-major in the others. The
    states may have any strides, unless they can't be seen as (B, n, n): those are copied.
    """

    def __init__(self, states: Tensor, sketch: Tensor, damping: float) -> None:
        self.states = states.reshape(-1, *states.shape[-2:])
        self.batch, self.n, self.r = states.shape[:-2].numel(), *sketch.shape
        self.rank = max(16, triton.next_power_of_2(self.r))
        self.damping = float(damping)
        self._maxima = self._largest_entries()

    @property
    def _parts(self) -> int:
        return self._maxima.shape[1]

    def _largest_entries(self) -> Tensor:
        """The largest |entry| (B, parts) of some rows of a state each."""
        settings = self._settings("largest_entries")
        parts = triton.cdiv(self.n, settings["ROWS"])
        maxima = self.states.new_empty(self.batch, parts)
        launching.launch(
            kernels.largest_entries,
            (self.batch * parts,),
            *(self.states, *self.states.stride(), maxima, self.n, parts),
            **settings,
        )
        return maxima

    def _small(self, *lead: int) -> Tensor:
        """Memory for r x r matrices, padded: (B, *lead, R, R) float64."""
        return self.states.new_empty((self.batch, *lead, self.rank, self.rank), dtype=torch.float64)

    def _settings(self, kernel: str) -> dict[str, int]:
        """The launch settings of a kernel; a tile of a small matrix is no wider than that."""
        found = tuned.settings(
            f"low_rank_polar.{kernel}", self.states.device, self.states.dtype, state=self.n, rank=self.rank
        )
        return {name: min(value, self.rank) if name in OF_RANK else value for name, value in found.items()}

    def state_product(
        self, transposed: bool, y: Tensor, x: Tensor, other: Tensor, extra: Tensor | None = None
    ) -> Tensor:
        """x = 2^e S y + extra, or with S^T; returns x^T other (B, R, R)."""
        settings = self._settings("state_product")
        blocks = triton.cdiv(self.n, settings["BLOCK_M"])
        grams = self._small(blocks)
        batch_stride, row_stride, column_stride = self.states.stride()
        strides = (column_stride, row_stride) if transposed else (row_stride, column_stride)
        launching.launch(
            kernels.state_product,
            (self.batch * blocks,),
            *(self.states, batch_stride, *strides, self._maxima, self._parts),
            *(y, y.stride(0), x if extra is None else extra, x, x.stride(0), other, other.stride(0), grams),
            *(self.n, self.r, blocks),
            EXTRA=extra is not None,
            PARTS=triton.next_power_of_2(self._parts),
            RANK=self.rank,
            **settings,
        )
        return grams.sum(1)

    def cholesky_transform(self, gram: Tensor, w: Tensor) -> None:
        """w = L^(-T) with L L^T = gram + c^2 I."""
        launching.launch(
            kernels.cholesky_transform,
            (self.batch,),
            *(gram, w, w.stride(0), self._small(2), self.damping, self.r),
            RANK=self.rank,
            **self._settings("cholesky_transform"),
        )

    def inverse_root(self, gram: Tensor, m: Tensor) -> None:
        """m = (gram + c^2 I)^(-1/2)."""
        parts = self._poles_at_once(kernels.root_parts, gram)
        m.copy_(parts.sum(1)[:, : self.r, : self.r])

    def root_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """2 G_A (B, R, R) of the last step, from its input and the gradient of its output."""
        settings = self._settings("gram_pair")
        blocks = triton.cdiv(self.n, settings["BLOCK_M"])
        grams = self._small(blocks, 2)
        launching.launch(
            kernels.gram_pair,
            (self.batch * blocks,),
            *(x, x.stride(0), grad, grams, self.n, self.r, blocks),
            RANK=self.rank,
            **settings,
        )
        gram, e = grams.sum(1).unbind(1)
        return self._poles_at_once(kernels.root_gradient_parts, gram, e + e.mT).sum(1)

    def _poles_at_once(self, kernel: Any, gram: Tensor, *more: Tensor) -> Tensor:
        """Sums over some of the poles each (B, programs, R, R)."""
        poles = _poles(self.damping, self.states.device)
        count = poles.shape[1]
        programs = triton.cdiv(count, max(1, triton.cdiv(count * self.batch, PROGRAMS)))
        parts = self._small(programs)
        launching.launch(
            kernel,
            (self.batch * programs,),
            *(gram, gram.stride(0), *more, poles, count, programs, parts, self._small(programs, 2)),
            *(self.damping, self.r),
            RANK=self.rank,
            **self._settings("root_parts"),
        )
        return parts

    def factor_gradient(self, product: Tensor, w: Tensor) -> Tensor:
        """2 G_A (B, R, R) of a Cholesky step, from product = G^T Y."""
        settings = self._settings("factor_gradient")
        grad_gram = self._small()
        launching.launch(
            kernels.factor_gradient,
            (self.batch * (self.rank // settings["COLUMNS"]),),
            *(product, w, w.stride(0), self._small(), grad_gram, self.r),
            RANK=self.rank,
            **settings,
        )
        return grad_gram

    def transformed(self, x: Tensor, w: Tensor, out: Tensor) -> None:
        """out = x w for one step (B, n, r), or for several (B, K, n, r)."""
        steps = x.shape[1] if x.dim() == 4 else 1
        self._transformed(x, w, (self.r, 1), None, None, out, steps)

    def step_gradient(self, grad: Tensor, w: Tensor, x: Tensor, grad_gram: Tensor, out: Tensor) -> None:
        """out = grad w^T + x (2 G_A + 2 damping^2 tr(G_A) I), with grad_gram = 2 G_A."""
        self._transformed(grad, w, (1, self.r), x, grad_gram, out, 1)

    def _transformed(
        self,
        x: Tensor,
        w: Tensor,
        strides: tuple[int, int],
        second: Tensor | None,
        grad_gram: Tensor | None,
        out: Tensor,
        steps: int,
    ) -> None:
        settings = self._settings("transformed")
        blocks = triton.cdiv(self.n, settings["BLOCK_M"])
        launching.launch(
            kernels.transformed,
            (self.batch * steps * blocks,),
            *(x, x.stride(0), w, w.stride(0), *strides),
            *(x if second is None else second, 0 if second is None else second.stride(0)),
            *(w if grad_gram is None else grad_gram, self.damping, out, out.stride(0)),
            *(self.n, self.r, steps, blocks),
            SECOND=second is not None,
            RANK=self.rank,
            **settings,
        )

    def outer_products(self, grads: Tensor, bases: Tensor) -> Tensor:
        """The gradient of the states (B, n, n): 2^e times the sum of grads_k bases_k^T, transposed for odd k."""
        settings = self._settings("outer_products")
        tiles = triton.cdiv(self.n, settings["BLOCK_M"]) * triton.cdiv(self.n, settings["BLOCK_N"])
        out = self.states.new_empty(self.batch, self.n, self.n)
        launching.launch(
            kernels.outer_products,
            (self.batch * tiles,),
            *(grads, bases, self._maxima, self._parts, out, self.n, self.r, grads.shape[1]),
            PARTS=triton.next_power_of_2(self._parts),
            **settings,
        )
        return out


@functools.cache
def _poles(damping: float, device: torch.device) -> Tensor:
    """`inverse_root_poles` as (2, N) float64, copied to a device once."""
    values = inverse_root_poles(damping, ROOT_ERROR, LARGEST_CONDITION)
    return torch.tensor(values, dtype=torch.float64, device=device)
