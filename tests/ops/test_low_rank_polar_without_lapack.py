"""The form of low_rank_polar in plain PyTorch that runs on a GPU: what it calls, and what only it has.

Values and gradients of both forms are in test_low_rank_polar.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mpmath
import pytest
import torch
from oracles import draw, gradients, relative, svd_norm, well_conditioned
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gakernels import low_rank_polar
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING, eager, shifted_inverses
from gakernels.ops.low_rank_polar.poles import inverse_root_poles
from gakernels.ops.low_rank_polar.shifted_inverses import LARGEST_CONDITION, triangular_inverse


@pytest.fixture
def without_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    assert not eager.uses_lapack(torch.device("cuda"))
    monkeypatch.setattr(eager, "uses_lapack", lambda device: False)


# CUDA code of PyTorch that factors matrix by matrix on the host, or copies to it and waits.
MATRIX_BY_MATRIX = ("eig", "svd", "qr", "lu", "inv", "lstsq", "solve", "householder", "ldl", "pinv", "cholesky_inverse")
WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "bincount")


class Recorder(TorchDispatchMode):
    """The operations that run, and which of them loop over matrices on the host or wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.faults: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.append(name)
        if self._is_at_fault(name, args, result):
            self.faults.append(name)
        return result

    def _is_at_fault(self, name: str, args: Any, result: Any) -> bool:
        tensors = [value for value in torch.utils._pytree.tree_leaves((args, result)) if isinstance(value, Tensor)]
        if any(tensor.device.type != "meta" for tensor in tensors):  # a copy to or from the host
            return True
        if name == "linalg_solve_triangular":  # in a loop for up to 8 matrices of 64 rows and more
            return args[0].shape[-1] >= 64
        library = name.removeprefix("_").startswith(("linalg_", "cholesky"))
        return name in WAITING or (library and any(part in name for part in MATRIX_BY_MATRIX))


def recorded(batch: tuple[int, ...], size: int, rank: int, dtype: torch.dtype, damping: float = 1e-3) -> Recorder:
    """What forward and backward call, here for tensors without data."""
    states = torch.empty(*batch, size, size, dtype=dtype, device="meta")
    sketch = torch.empty(size, rank, dtype=dtype, device="meta")
    with Recorder() as recorder:
        u, v, steps = eager.forward(states, sketch, 1, damping)
        grad = eager.backward(u, v, states, sketch, steps, damping)
    assert grad.shape == states.shape
    assert grad.dtype == u.dtype == v.dtype == dtype
    return recorder


@pytest.mark.usefixtures("without_lapack")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 1e-4, DEFAULT_DAMPING, 3e-2, 10.0])
@pytest.mark.parametrize(
    ("batch", "size", "rank"),
    [((), 1, 1), ((3,), 64, 1), ((1,), 9, 9), ((2, 3), 33, 13), ((8,), 128, 65), ((1,), 256, 200), ((8,), 1024, 128)],
)
def test_nothing_on_a_gpu_goes_matrix_by_matrix_or_waits(
    batch: tuple[int, ...], size: int, rank: int, dtype: torch.dtype, damping: float
) -> None:
    recorder = recorded(batch, size, rank, dtype, damping)
    assert recorder.names.count("linalg_cholesky_ex") >= 5  # the recorder sees them
    assert not recorder.faults


def test_the_recorder_finds_eigenvectors_and_copies() -> None:
    assert recorded((2,), 128, 70, torch.float32).faults == [*["linalg_solve_triangular"] * 3, "_linalg_eigh"]
    with Recorder() as recorder:
        torch.ones(3).to("meta")
    assert "_to_copy" in recorder.faults


@pytest.mark.usefixtures("without_lapack")
@pytest.mark.parametrize("rank", [13, 64])
def test_the_number_of_calls_does_not_depend_on_that_of_the_matrices(rank: int) -> None:
    calls = [recorded((batch,), 256, rank, torch.float64).names for batch in (2, 128, 100_000, 200_000)]
    assert calls[0] == calls[1]
    assert calls[2] == calls[3]  # the most groups of poles: one each
    poles = len(inverse_root_poles(DEFAULT_DAMPING, 1e-14, LARGEST_CONDITION)[0])
    assert len(calls[0]) < len(calls[2]) <= poles * len(calls[0])


def test_the_shapes_of_what_is_saved_follow_the_device() -> None:
    with FakeTensorMode():
        for device, width in (("cpu", 5), ("cuda", 0)):
            states, sketch = torch.empty(2, 3, 16, 16, device=device), torch.empty(16, 5, device=device)
            *_, roots, vectors = torch.ops.gakernels.low_rank_polar(states, sketch, 1, 1e-3, "eager")
            assert roots.shape == (2, 3, width)
            assert vectors.shape == (2, 3, width, width)


# --- on a CPU ---------------------------------------------------------------------------------------------------------


def norm(states: Tensor, sketch: Tensor, damping: float = DEFAULT_DAMPING) -> Tensor:
    u, v = low_rank_polar(states, sketch, 1, damping)
    return u @ v.mT


def results(function: Callable[[Tensor], Tensor], states: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    return function(states), gradients(function, upstream, states)[0]


@pytest.mark.usefixtures("without_lapack")
@pytest.mark.parametrize("rank", [40, 65, 144])
@pytest.mark.parametrize("damping", [1e-6, DEFAULT_DAMPING])
def test_ranks_above_a_block(generator: Generator, monkeypatch: pytest.MonkeyPatch, rank: int, damping: float) -> None:
    states, sketch = well_conditioned(generator, 2, 150, 150), well_conditioned(generator, 150, rank)
    upstream = draw(generator, 2, 150, 150)
    value, gradient = results(partial(norm, sketch=sketch, damping=damping), states, upstream)
    torch.testing.assert_close(value, svd_norm(states, sketch, damping), rtol=0, atol=1e-10)
    monkeypatch.setattr(eager, "uses_lapack", lambda device: True)
    wanted = results(partial(norm, sketch=sketch, damping=damping), states, upstream)
    assert relative(gradient, wanted[1]) <= 1e-10


@pytest.mark.usefixtures("without_lapack")
def test_groups_of_poles_change_only_the_rounding(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    states, sketch, upstream = draw(generator, 3, 20, 20), draw(generator, 20, 7), draw(generator, 3, 20, 20)
    wanted = results(partial(norm, sketch=sketch), states, upstream)
    for group in (1, 3 * 7 * 7 * 4):  # one pole, and four of them
        monkeypatch.setattr(shifted_inverses, "GROUP", group)
        for mine, theirs in zip(results(partial(norm, sketch=sketch), states, upstream), wanted, strict=True):
            assert relative(mine, theirs) <= 1e-12


@pytest.mark.usefixtures("without_lapack")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank_of_state", [1, 5, 70])
def test_without_damping_it_is_finite(generator: Generator, dtype: torch.dtype, rank_of_state: int) -> None:
    """The least damping keeps every pivot positive; smaller ones count as that."""
    states = (draw(generator, 2, 70, rank_of_state) @ draw(generator, 2, rank_of_state, 70)).to(dtype)
    sketch, upstream = draw(generator, 70, 40).to(dtype), draw(generator, 2, 70, 70).to(dtype)
    wanted = results(partial(norm, sketch=sketch, damping=eager.LEAST_DAMPING), states, upstream)
    for mine, theirs in zip(results(partial(norm, sketch=sketch, damping=0.0), states, upstream), wanted, strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rank", [1, 2, 31, 32, 33, 64, 65, 100, 129])
def test_the_inverse_of_a_triangle(generator: Generator, rank: int) -> None:
    matrices = draw(generator, 2, 3, rank, rank)
    factors = torch.linalg.cholesky(matrices @ matrices.mT + 1e-6 * torch.eye(rank, dtype=torch.float64))
    ours = triangular_inverse(factors)
    identity = torch.eye(rank, dtype=torch.float64).expand_as(factors)
    assert relative(ours, torch.linalg.solve_triangular(factors, identity, upper=False)) <= 1e-13
    assert not ours.triu(1).any()


@pytest.mark.parametrize("damping", [eager.LEAST_DAMPING, 1e-5, DEFAULT_DAMPING, 3e-2, 1.0, 100.0])
@pytest.mark.parametrize("error", [1e-9, 1e-14])
def test_the_poles_give_the_inverse_square_root(damping: float, error: float) -> None:
    """And twice its derivative. In 40 digits, for float64 would not resolve the errors."""
    poles, weights = inverse_root_poles(damping, error, LARGEST_CONDITION)
    assert min(poles) > 0
    assert min(weights) > 0
    low, high = 2 * math.log(damping), math.log(1 + damping**2)
    with mpmath.workdps(40):
        for i in range(101):
            x = mpmath.exp(low + (high - low) * i / 100)
            value = mpmath.fsum(w / (x + s) for s, w in zip(poles, weights, strict=True))
            slope = mpmath.fsum(w / (x + s) ** 2 for s, w in zip(poles, weights, strict=True))
            assert abs(value * mpmath.sqrt(x) - 1) <= 1.1 * error
            assert abs(2 * slope * mpmath.sqrt(x) ** 3 - 1) <= 50 * error


@pytest.mark.usefixtures("without_lapack")
@pytest.mark.parametrize("damping", [0.0, DEFAULT_DAMPING])
def test_opcheck(generator: Generator, damping: float) -> None:
    states, sketch = draw(generator, 2, 12, 12).requires_grad_(), draw(generator, 12, 5)
    torch.library.opcheck(torch.ops.gakernels.low_rank_polar.default, (states, sketch, 1, damping, "eager"))


@pytest.mark.usefixtures("without_lapack")
def test_compiled(generator: Generator) -> None:
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 5):
        states, sketch, upstream = (
            draw(generator, batch, 20, 20),
            draw(generator, 20, 7),
            draw(generator, batch, 20, 20),
        )
        ours, wanted = (results(partial(f, sketch=sketch), states, upstream) for f in (compiled, norm))
        for mine, theirs in zip(ours, wanted, strict=True):
            assert relative(mine, theirs) <= 1e-12


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("damping", [0.0, DEFAULT_DAMPING])
@pytest.mark.parametrize(("batch", "size", "rank"), [((), 9, 1), ((3,), 65, 33), ((1,), 96, 70), ((20,), 128, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu(
    generator: Generator, batch: tuple[int, ...], size: int, rank: int, dtype: torch.dtype, damping: float
) -> None:
    """Value and gradient of <upstream, norm(S)>, and no wait for the device."""
    states, sketch = well_conditioned(generator, *batch, size, size), well_conditioned(generator, size, rank)
    states, sketch, upstream = (x.to(dtype) for x in (states, sketch, draw(generator, *batch, size, size)))
    on_gpu = states.cuda(), sketch.cuda(), upstream.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        u, v, steps = eager.forward(*on_gpu[:2], 1, damping)
        gradient = eager.backward(on_gpu[2] @ v, on_gpu[2].mT @ u, *on_gpu[:2], steps, damping)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert relative((u @ v.mT).cpu(), svd_norm(states.double(), sketch.double(), damping)) <= tolerance
    function = partial(norm, sketch=sketch.double(), damping=damping)
    assert relative(gradient.cpu(), gradients(function, upstream.double(), states.double())[0]) <= 10 * tolerance
