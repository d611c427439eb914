"""Providers of an operation: the library's implementations, their compiled form, and what people use instead.

A provider is made by `provider(operation, name, device)` and called with the operation's arguments; it returns what the
operation returns, differentiable. Those in FLOORS compute less than the operation.
"""

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import UnavailableError
from gakernels import ops
from gakernels.ops import dispatch
from gakernels.ops.context_state import eager as state_eager
from gakernels.ops.gated_product import eager as product_eager
from gakernels.ops.low_rank_polar import eager as polar_eager
from gakernels.ops.lowrank_linear import eager as linear_eager

Implementation = Callable[..., Any]
P = ParamSpec("P")
R = TypeVar("R")

COMMON = ("reference", "eager", "compiled", "triton", "cuda")
NAMES = {
    "context_state": COMMON,
    "low_rank_polar": (*COMMON, "svd_lowrank", "linalg_svd"),
    "lowrank_linear": (*COMMON, "baddbmm", "base_gemm"),
    "gated_product": ("reference", "eager", "compiled", "triton"),
}
FLOORS = {("lowrank_linear", "base_gemm")}


def provider(operation: str, name: str, device: torch.device) -> Implementation:
    """The named implementation of an operation.

    Raises:
        UnavailableError: it does not exist in this installation, or can't run here.
    """
    if name == "compiled":
        return _compiled(operation, device)
    if name in dispatch.BACKENDS:
        return _library(operation, name, device)
    return OTHERS[operation, name]


def with_backend(name: str, function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs with all operations forced to a backend."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with backend(name):
            return function(*args, **kwargs)

    return run


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force all operations to a backend while the block runs; `auto` forces nothing."""
    before = os.environ.pop(dispatch.ENVIRONMENT_VARIABLE, None)
    if name != "auto":
        os.environ[dispatch.ENVIRONMENT_VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(dispatch.ENVIRONMENT_VARIABLE, None)
        if before is not None:
            os.environ[dispatch.ENVIRONMENT_VARIABLE] = before


def _library(operation: str, name: str, device: torch.device) -> Implementation:
    if name in ("triton", "cuda"):
        obstacle = dispatch.missing(operation, name)
        if obstacle is not None:
            raise UnavailableError(obstacle)
        if device.type != "cuda":
            raise UnavailableError("kernels are timed on a GPU only")
    return with_backend(name, getattr(ops, operation))


# Our algorithm, compiled: the forward and backward of `eager.py` without the custom operator around them, inside which
# torch.compile would see nothing to fuse.


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Unwrapped: the wrapper that turns autocast off is a single function, whose recompilations would be counted
    # together until torch.compile gave up. With fullgraph it fails instead of silently falling back to eager.
    return torch.compile(inspect.unwrap(function), dynamic=False, fullgraph=True)


class _CompiledState(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, a2: Tensor, b1: Tensor, mask: Tensor | None, initial: Tensor | None) -> Any:
        states, projected = _compile(state_eager.forward)(hidden, a2, b1, mask, initial)
        ctx.save_for_backward(hidden, a2, b1, mask, projected)
        ctx.has_initial = initial is not None
        return states

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> Any:
        needs = tuple(ctx.needs_input_grad[:3])
        grads = _compile(state_eager.backward)(grad_states, *ctx.saved_tensors, needs)
        return *grads[:3], None, grads[3] if ctx.has_initial else None


class _CompiledPolar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, sketch: Tensor, power_iterations: int, damping: float) -> Any:
        u, v, steps = _compile(polar_eager.forward)(states, sketch, power_iterations, damping)
        ctx.save_for_backward(states, sketch, *steps)
        ctx.damping = damping
        return u, v

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor, grad_v: Tensor) -> Any:
        states, sketch, *steps = ctx.saved_tensors
        saved = polar_eager.Steps(*steps)
        return _compile(polar_eager.backward)(grad_u, grad_v, states, sketch, saved, ctx.damping), None, None, None


class _CompiledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        index: Tensor | None,
        bias: Tensor | None,
    ) -> Any:
        y, z = _compile(linear_eager.forward)(x, weight, lora_a, lora_b, scale, index, bias)
        needs_x, _, needs_a, needs_b = ctx.needs_input_grad[:4]
        ctx.scale, ctx.needs_x = scale, needs_x
        ctx.save_for_backward(x if needs_a else None, z if needs_b else None, weight, lora_a, lora_b, index)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, z, weight, lora_a, lora_b, index = ctx.saved_tensors
        backward = _compile(linear_eager.backward)
        grad_x, grad_a, grad_b = backward(grad_y, x, z, weight, lora_a, lora_b, ctx.scale, index, ctx.needs_x)
        return grad_x, None, grad_a, grad_b, None, None, None


class _CompiledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Any:
        ctx.save_for_backward(gate, up)
        return _compile(product_eager.forward)(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _compile(product_eager.backward)(grad, *ctx.saved_tensors)


COMPILED = {
    "context_state": _CompiledState,
    "low_rank_polar": _CompiledPolar,
    "lowrank_linear": _CompiledLinear,
    "gated_product": _CompiledProduct,
}


def _compiled(operation: str, device: torch.device) -> Implementation:
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UnavailableError(f"torch.compile needs a C++ compiler on a CPU, and there is no {compiler}")
    return COMPILED[operation].apply


# What people use instead


def _svd_lowrank(states: Tensor, sketch: Tensor, power_iterations: int, damping: float) -> tuple[Tensor, Tensor]:
    """As the released code does: `torch.svd_lowrank` with its own random sketch, undamped."""
    u, _, v = torch.svd_lowrank(states, q=sketch.shape[1], niter=power_iterations)
    return u, v


def _linalg_svd(states: Tensor, sketch: Tensor, power_iterations: int, damping: float) -> tuple[Tensor, Tensor]:
    """The full decomposition, truncated to r directions; neither sketched nor damped."""
    rank = sketch.shape[1]
    u, _, vh = torch.linalg.svd(states, full_matrices=False)
    return u[..., :rank], vh[..., :rank, :].mT


def _baddbmm(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, index: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The base GEMM and a fused add of the low-rank term, differentiated by autograd: a strong simple baseline."""
    if index is not None:
        lora_a, lora_b = linear_eager.select(lora_a, index), linear_eager.select(lora_b, index)
    return torch.baddbmm(F.linear(x, weight, bias), x @ lora_a.mT, lora_b.mT, alpha=scale)


def _base_gemm(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, index: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The frozen layer alone, without any adapter: a floor."""
    return F.linear(x, weight, bias)


OTHERS: dict[tuple[str, str], Implementation] = {
    ("low_rank_polar", "svd_lowrank"): _svd_lowrank,
    ("low_rank_polar", "linalg_svd"): _linalg_svd,
    ("lowrank_linear", "baddbmm"): _baddbmm,
    ("lowrank_linear", "base_gemm"): _base_gemm,
}
