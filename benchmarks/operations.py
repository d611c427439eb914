"""The cases of the operations: sizes, random inputs, the float64 oracle, and the work of a case."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from benchmarks import providers
from benchmarks.cases import TOLERANCES, BenchmarkCase, Trial, Work, largest_error
from benchmarks.measure import dtype_name
from benchmarks.rows import FLOOR, OK
from gakernels.ops.context_state import reference as state_reference
from gakernels.ops.gated_product import reference as product_reference
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING
from gakernels.ops.low_rank_polar import reference as polar_reference
from gakernels.ops.lowrank_linear import reference as linear_reference

MANY = 32  # segments or users in `many_states`
SEED = int(os.environ.get("GAKERNELS_TEST_SEED") or int.from_bytes(os.urandom(4), "big"))


@dataclass(frozen=True)
class OperationSizes:
    """T chunks of M tokens, and the layer that reads them; 2 T windows with T adapters, as in a training segment."""

    chunks: int
    tokens: int
    hidden: int
    state: int
    rank: int
    layers: tuple[tuple[int, int], ...]  # (d_in, d_out) of adapted linear layers


PRESETS = {
    "tiny": OperationSizes(chunks=3, tokens=8, hidden=24, state=16, rank=4, layers=((12, 20),)),
    "cpu": OperationSizes(chunks=8, tokens=128, hidden=512, state=256, rank=32, layers=((512, 512),)),
    "cpu-mid": OperationSizes(chunks=8, tokens=256, hidden=1024, state=512, rank=64, layers=((1024, 1024),)),
    # The states of 32 segments of 4 chunks, and the layers that read them.
    "smollm2-135m": OperationSizes(
        chunks=128, tokens=256, hidden=576, state=256, rank=64, layers=((576, 576), (1536, 576))
    ),
    "mistral-7b-1-chunk": OperationSizes(
        chunks=1, tokens=1024, hidden=4096, state=1024, rank=128, layers=((4096, 4096),)
    ),
    "mistral-7b": OperationSizes(
        chunks=8, tokens=1024, hidden=4096, state=1024, rank=128, layers=((4096, 4096), (14336, 4096))
    ),
}


S = TypeVar("S")


def sizes_of(presets: Mapping[str, S], name: str) -> S:
    """Raises: ValueError: there is no preset by that name."""
    if name not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)}, but it is {name!r}")
    return presets[name]


class Operation:
    """One operation at one size: draws inputs and computes their results. `leaves` are the arguments with gradients.

    The defaults suit an operation that returns one tensor.
    """

    name: str
    shape: str
    leaves: tuple[int, ...]
    forward_work: Work
    backward_work: Work
    looseness = 1.0  # factor of the tolerance

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    @property
    def provider_names(self) -> tuple[str, ...]:
        """The names of the providers."""
        return providers.NAMES[self.name]

    def implementation(self, name: str) -> providers.Implementation:
        """A provider. Raises: UnavailableError: it is not available here."""
        return providers.provider(self.name, name, self.device)

    def is_floor(self, name: str) -> bool:
        """Whether a provider computes less than the operation."""
        return (self.name, name) in providers.FLOORS

    def draw(self, generator: Generator) -> tuple[Any, ...]:
        """Fresh random arguments on the device."""
        raise NotImplementedError

    def oracle(self, *arguments: Any) -> Tensor:
        """What float64 arguments must give, by the plain definition."""
        raise NotImplementedError

    def defined(self, returned: Any) -> Tensor:
        """The part of a provider's result that the operation defines."""
        return returned

    def upstream(self, returned: Any, gradient: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The returned tensors and their gradients, from the gradient of the defined part."""
        return (returned,), (gradient,)

    def random(self, generator: Generator, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32) * std
        return values.to(dtype or self.dtype)


class ContextState(Operation):
    """S_t for T chunks of one segment."""

    name, leaves = "context_state", (0, 1, 2)

    def __init__(self, sizes: OperationSizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.sizes = sizes
        t, m, h, r = sizes.chunks, sizes.tokens, sizes.hidden, sizes.state
        self.shape = f"T={t} M={m} d_h={h} d_r={r}"
        width, states = dtype.itemsize, 4.0 * t * r * r
        projection, outer = 2.0 * t * m * h * 2 * r, 2.0 * t * m * r * r
        self.forward_work = Work(projection + outer, width * (t * m * h + 2 * h * r) + states)
        inputs = t * m * h + 2 * h * r + t * m * 2 * r
        self.backward_work = Work(2 * projection + 2 * outer, width * (inputs + t * m * h + 2 * h * r) + states)

    def draw(self, generator: Generator) -> tuple[Any, ...]:
        s = self.sizes
        std = (3 * s.hidden) ** -0.5
        hidden = self.random(generator, 1, s.chunks, s.tokens, s.hidden)
        a2 = self.random(generator, s.state, s.hidden, std=std)
        b1 = self.random(generator, s.hidden, s.state, std=std)
        return hidden, a2, b1, None, None

    def oracle(self, *arguments: Any) -> Tensor:
        return state_reference.context_state(*arguments)


class LowRankPolar(Operation):
    """norm(S) of T states whose spectra have a gap after r directions, so that all definitions of the norm agree.

    For that the spectra are nearly flat, so the default damping changes norm and gradient by less than the tolerance
    (2e-4 at d_r = 1024, r = 128), and the tail is small: the gradient of the sketched norm differs from that of an SVD
    by its square, more if the sketch meets the range badly. The r x r symmetric functions are not counted as work:
    the tall products are at least 2 d_r / r times as large.
    """

    name, leaves = "low_rank_polar", (0,)

    def __init__(self, sizes: OperationSizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.sizes, self.power_iterations = sizes, 1
        t, n, r = sizes.chunks, sizes.state, sizes.rank
        self.shape = f"T={t} d_r={n} r={r}"
        width, steps = dtype.itemsize, 2 + 2 * self.power_iterations
        with_state, gram = 2.0 * n * n * r, 2.0 * n * r * r
        self.forward_work = Work(t * steps * (with_state + 2 * gram), width * (t * n * n + n * r + 2.0 * t * n * r))
        # A step: X^T G, G M, X G_A and the basis again; all but the first pass on a gradient; dS takes one product.
        backward = (steps - 1) * with_state + steps * with_state + (3 * steps + steps - 1) * gram
        moved = 2 * t * n * n + n * r + (2 + steps) * t * n * r
        self.backward_work = Work(t * backward, width * float(moved))

    def draw(self, generator: Generator) -> tuple[Any, ...]:
        t, n, r = self.sizes.chunks, self.sizes.state, self.sizes.rank
        left, right = (
            torch.linalg.qr(self.random(generator, t, n, r, dtype=torch.float64)).Q.to(self.dtype) for _ in range(2)
        )
        spectrum = torch.linspace(1, 0.5, r, device=self.device, dtype=self.dtype)
        tail = self.random(generator, t, n, n, std=1e-5 * n**-0.5 / 2)  # largest singular value near 1e-5
        return (left * spectrum) @ right.mT + tail, self.random(generator, n, r), self.power_iterations, DEFAULT_DAMPING

    def oracle(self, *arguments: Any) -> Tensor:
        return self.defined(polar_reference.low_rank_polar(*arguments))

    def defined(self, returned: Any) -> Tensor:
        u, v = returned
        return u @ v.mT

    def upstream(self, returned: Any, gradient: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        u, v = returned
        return (u, v), ((gradient @ v).detach(), (gradient.mT @ u).detach())


class LowRankLinear(Operation):
    """2 T windows through a frozen layer: context window t with adapter t - 1, reconstruction window t with t."""

    name, leaves = "lowrank_linear", (0, 2, 3)

    def __init__(self, sizes: OperationSizes, layer: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.sizes, (self.inputs, self.outputs) = sizes, layer
        adapters, m, r = sizes.chunks, sizes.tokens, sizes.rank
        windows, i, o = 2 * adapters, self.inputs, self.outputs
        self.shape = f"windows={windows} M={m} d_in={i} d_out={o} r={r}"
        width, rows = dtype.itemsize, float(windows * m)
        base, thin = 2.0 * rows * i * o, 2.0 * rows * r
        factors, weight = adapters * r * (i + o), i * o
        self.forward_work = Work(base + thin * (i + o), width * (rows * (i + o) + weight + factors))
        moved = rows * (o + i + r) + rows * i + weight + 2 * factors
        self.backward_work = Work(base + 2 * thin * (i + o), width * moved)

    def draw(self, generator: Generator) -> tuple[Any, ...]:
        t, m, r = self.sizes.chunks, self.sizes.tokens, self.sizes.rank
        x = self.random(generator, 2 * t, m, self.inputs)
        weight = self.random(generator, self.outputs, self.inputs, std=self.inputs**-0.5)
        lora_a = self.random(generator, t, r, self.inputs, std=self.inputs**-0.5)
        lora_b = self.random(generator, t, self.outputs, r, std=r**-0.5)
        index = torch.cat([torch.arange(-1, t - 1), torch.arange(t)]).to(self.device)
        return x, weight, lora_a, lora_b, 0.5, index, None

    def oracle(self, *arguments: Any) -> Tensor:
        return linear_reference.lowrank_linear(*arguments)


class GatedProduct(Operation):
    """silu(gate) * up for a number of tokens. Five operations a number, nine in the backward."""

    name, leaves = "gated_product", (0, 1)

    provider_names: tuple[str, ...] = providers.NAMES["gated_product"]

    def __init__(self, tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.size, numbers = (tokens, width), tokens * width
        self.shape = f"numbers={numbers}"
        self.forward_work = Work(5.0 * numbers, 3.0 * dtype.itemsize * numbers)
        self.backward_work = Work(9.0 * numbers, 5.0 * dtype.itemsize * numbers)

    def draw(self, generator: Generator) -> tuple[Any, ...]:
        return self.random(generator, *self.size), self.random(generator, *self.size)

    def oracle(self, *arguments: Any) -> Tensor:
        return product_reference.gated_product(*arguments)


def operations(preset: str, device: torch.device, dtype: torch.dtype) -> list[Operation]:
    """The operations at the sizes of a preset. States are float32 or wider whatever the dtype.

    Raises:
        ValueError: there is no such preset.
    """
    return operations_of(sizes_of(PRESETS, preset), device, dtype)


def operations_of(sizes: OperationSizes, device: torch.device, dtype: torch.dtype) -> list[Operation]:
    """The operations at some sizes. States are float32 or wider whatever the dtype."""
    return [
        ContextState(sizes, device, dtype),
        LowRankPolar(sizes, device, torch.promote_types(dtype, torch.float32)),
        *(LowRankLinear(sizes, layer, device, dtype) for layer in sizes.layers),
        GatedProduct(2 * sizes.chunks * sizes.tokens, max(wide for wide, _ in sizes.layers), device, dtype),
    ]


def many_states(
    preset: str, device: torch.device, dtype: torch.dtype, names: Sequence[str] | None = None
) -> list[BenchmarkCase]:
    """`low_rank_polar` for the states of many segments or users at once, without the decompositions of whole matrices,
    which take minutes. Raises: ValueError: there is no such preset."""
    plain = sizes_of(PRESETS, preset)
    sizes = replace(plain, chunks=MANY * plain.chunks)
    polar = LowRankPolar(sizes, device, torch.promote_types(dtype, torch.float32))
    wanted = [name for name in polar.provider_names if name not in ("reference", "compiled", "linalg_svd")]
    return cases_of([polar], [name for name in wanted if names is None or name in names])


def cases(
    preset: str, device: torch.device, dtype: torch.dtype, names: Sequence[str] | None = None, backward: bool = True
) -> list[BenchmarkCase]:
    """Forward and backward of each operation, with the named providers or all of them."""
    return cases_of(operations(preset, device, dtype), names, backward)


def cases_of(
    operations: Sequence[Operation], names: Sequence[str] | None = None, backward: bool = True
) -> list[BenchmarkCase]:
    return [
        _case(operation, mode, [name for name in operation.provider_names if names is None or name in names])
        for operation in operations
        for mode in (("forward", "backward") if backward else ("forward",))
    ]


def _case(operation: Operation, mode: str, names: Sequence[str]) -> BenchmarkCase:
    return BenchmarkCase(
        kernel=operation.name,
        mode=mode,
        shape=operation.shape,
        dtype=dtype_name(operation.dtype),
        tolerance=operation.looseness * TOLERANCES[operation.dtype],
        work=operation.forward_work if mode == "forward" else operation.backward_work,
        providers={name: functools.partial(_trial, operation, mode, name) for name in names},
    )


def _trial(operation: Operation, mode: str, name: str) -> Trial:
    implementation = operation.implementation(name)
    is_floor = operation.is_floor(name)
    status = FLOOR if is_floor else OK
    generator = seeded(operation.device, 1)
    sets = [operation.draw(generator) for _ in range(3 if operation.device.type == "cuda" else 2)]
    check = None if is_floor else functools.partial(oracle_error, operation, mode, implementation)
    if mode == "forward":
        run = torch.no_grad()(lambda arguments: implementation(*arguments))
        return Trial(lambda i: sets[i % len(sets)], run, check, status=status)

    def prepare(i: int) -> tuple[Any, ...]:
        arguments, leaves = with_leaves(operation, sets[i % len(sets)])
        returned = implementation(*arguments)
        gradient = torch.randn_like(operation.defined(returned))
        return (*operation.upstream(returned, gradient), leaves)

    return Trial(prepare, backward, check, status=status)


def backward(prepared: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of the leaves; None if a floor does not use one."""
    outputs, gradients, leaves = prepared
    return torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)


def with_leaves(operation: Operation, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The arguments, with those that need gradients replaced by leaves."""
    leaves = [arguments[position].detach().requires_grad_() for position in operation.leaves]
    changed = list(arguments)
    for position, leaf in zip(operation.leaves, leaves, strict=True):
        changed[position] = leaf
    return tuple(changed), leaves


@functools.lru_cache(maxsize=1)
def _expected(operation: Operation) -> tuple[tuple[Any, ...], Tensor, tuple[Tensor, ...], Tensor]:
    """Arguments, the upstream gradient, the oracle's gradients and its output."""
    generator = seeded(operation.device, 0)
    arguments = operation.draw(generator)
    wide = tuple(
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments
    )
    changed, leaves = with_leaves(operation, wide)
    output = operation.oracle(*changed)
    upstream = operation.random(generator, *output.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(output, leaves, upstream)
    return arguments, upstream, gradients, output.detach()


def oracle_error(operation: Operation, mode: str, implementation: providers.Implementation) -> float:
    """The largest distance from the oracle, of the output and, for the backward, of each gradient."""
    arguments, upstream, gradients, expected = _expected(operation)
    poison(operation.device)
    if mode == "forward":
        with torch.no_grad():
            return largest_error([operation.defined(implementation(*arguments))], [expected])
    changed, leaves = with_leaves(operation, arguments)
    returned = implementation(*changed)
    output = operation.defined(returned)
    values = backward((*operation.upstream(returned, upstream.to(output.dtype)), leaves))
    missing = [torch.zeros_like(leaf) if value is None else value for value, leaf in zip(values, leaves, strict=True)]
    return largest_error([output, *missing], [expected, *gradients])


def seeded(device: torch.device, number: int) -> Generator:
    """A random generator seeded for this run."""
    return Generator(device).manual_seed(SEED + number)


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next tensors get on a GPU, so that elements that a kernel skips are noticed."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        torch.full((min(2**30, free // 8),), torch.nan, device=device)
