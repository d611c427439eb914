"""The CUDA kernels of `low_rank_polar`, emulated on the host, against the float64 definition.

The tests run the very source of the kernels, thread by thread. What only a GPU can show is in test_cuda_backend.py.
"""

from pathlib import Path
from types import ModuleType

import cuda_host
import pytest
import torch
from oracles import draw, gradients, orthogonal, relative, state_of, svd_norm
from torch import Generator, Tensor

from gakernels import low_rank_polar
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING, reference
from gakernels.ops.low_rank_polar.precision import EXACT_BELOW

pytestmark = pytest.mark.kernels

STATE_SIZE, RANK = 128, 32
EXACT_DAMPING = 1e-6  # one of those with which all is computed in float64
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def spectrum(kind: str, decades: float = 0.0, state_size: int = STATE_SIZE, rank: int = RANK) -> Tensor:
    """Singular values of a state with s_1 / s_r = 10^decades."""
    k = torch.arange(state_size, dtype=torch.float64)
    if kind == "power law":
        return (k + 1) ** (-decades / torch.log10(torch.tensor(float(rank))))
    if kind == "clustered":  # four clusters of nearly equal values within the rank
        return 10 ** (-decades / 3 * (4 * k / rank).floor().clamp(max=4)) * (1 + 1e-9 * k)
    if kind == "deficient":
        return 10 ** (-decades * k / (rank // 4 - 1)) * (k < rank // 4)
    return 10 ** (-decades * k / (rank - 1))


def meeting_sketch(generator: Generator, states: Tensor) -> Tensor:
    """A sketch that no direction of the state's range is nearly orthogonal to: that would amplify float32 rounding."""
    range_of_state = torch.linalg.svd(states[0].double()).Vh[:RANK]
    while True:
        sketch = draw(generator, STATE_SIZE, RANK).float()
        if torch.linalg.svdvals(range_of_state @ sketch.double())[-1] >= 0.05:
            return sketch


def exact(states: Tensor, sketch: Tensor, upstream: Tensor, damping: float, power_iterations: int = 1) -> Tensor:
    """The gradient of <upstream, norm(S)> by the float64 operation in plain PyTorch."""

    def norm(s: Tensor) -> Tensor:
        u, v = low_rank_polar(s, sketch.double(), power_iterations, damping)
        return u @ v.mT

    return gradients(norm, upstream.double(), states.double())[0]


def errors(states: Tensor, sketch: Tensor, upstream: Tensor, damping: float) -> tuple[float, float]:
    value, gradient = cuda_host.norm_and_gradient(states, sketch, upstream, 1, damping)
    return (
        relative(value, svd_norm(states.double(), sketch.double(), damping)),
        relative(gradient, exact(states, sketch, upstream, damping)),
    )


# --- the algorithm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decades", [0, 2, 4, 7])
@pytest.mark.parametrize("kind", ["geometric", "power law", "clustered"])
def test_spectra_at_the_default_damping(generator: Generator, kind: str, decades: int) -> None:
    states = state_of(generator, spectrum(kind, decades)).float()[None]
    sketch, upstream = meeting_sketch(generator, states), draw(generator, 1, STATE_SIZE, STATE_SIZE).float()
    value_error, gradient_error = errors(states, sketch, upstream, DEFAULT_DAMPING)
    assert value_error <= VALUE_TOLERANCE
    assert gradient_error <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("damping", [0.0, EXACT_DAMPING])
@pytest.mark.parametrize("decades", [0, 2, 4])
@pytest.mark.parametrize("kind", ["geometric", "power law", "clustered"])
def test_spectra_in_float64(generator: Generator, kind: str, decades: int, damping: float) -> None:
    """With a small damping, or none, the bounds are those of the default up to 4 decades."""
    states = state_of(generator, spectrum(kind, decades)).float()[None]
    sketch, upstream = draw(generator, STATE_SIZE, RANK).float(), draw(generator, 1, STATE_SIZE, STATE_SIZE).float()
    value_error, gradient_error = errors(states, sketch, upstream, damping)
    assert value_error <= VALUE_TOLERANCE
    assert gradient_error <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("decades", [0, 2])
@pytest.mark.parametrize("damping", [1e-4, EXACT_BELOW, 3e-2])
def test_other_dampings(generator: Generator, decades: int, damping: float) -> None:
    states = state_of(generator, spectrum("geometric", decades)).float()[None]
    sketch, upstream = meeting_sketch(generator, states), draw(generator, 1, STATE_SIZE, STATE_SIZE).float()
    value_error, gradient_error = errors(states, sketch, upstream, damping)
    assert value_error <= VALUE_TOLERANCE
    assert gradient_error <= GRADIENT_TOLERANCE


@pytest.mark.parametrize(("decades", "value_limit", "gradient_limit"), [(5, 1e-3, 1e-2), (6, 0.1, 1), (7, 1, 10)])
def test_without_damping_the_loss_is_graceful(
    generator: Generator, decades: int, value_limit: float, gradient_limit: float
) -> None:
    states = state_of(generator, spectrum("geometric", decades)).float()[None]
    sketch, upstream = draw(generator, STATE_SIZE, RANK).float(), draw(generator, 1, STATE_SIZE, STATE_SIZE).float()
    value_error, gradient_error = errors(states, sketch, upstream, 0.0)
    assert value_error <= value_limit
    assert gradient_error <= gradient_limit


@pytest.mark.parametrize("damping", [1e-4, DEFAULT_DAMPING])
@pytest.mark.parametrize("decades", [0.0, 1.0])
def test_states_of_missing_rank(generator: Generator, decades: float, damping: float) -> None:
    states = state_of(generator, spectrum("deficient", decades))
    states[0] = 0  # rows and columns of zeros, as of a projection without output
    states = states.float()[None]
    sketch, upstream = draw(generator, STATE_SIZE, RANK).float(), draw(generator, 1, STATE_SIZE, STATE_SIZE).float()
    value_error, gradient_error = errors(states, sketch, upstream, damping)
    assert value_error <= VALUE_TOLERANCE
    assert gradient_error <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("damping", [0.0, 1e-5, DEFAULT_DAMPING])
@pytest.mark.parametrize("kind", ["rank one", "identity", "steep"])
def test_everything_is_bounded(generator: Generator, kind: str, damping: float) -> None:
    state = {
        "rank one": torch.outer(draw(generator, STATE_SIZE), draw(generator, STATE_SIZE)),
        "identity": torch.eye(STATE_SIZE, dtype=torch.float64),
        "steep": state_of(generator, spectrum("geometric", 30)),
    }[kind]
    states, upstream = state.float()[None], draw(generator, 1, STATE_SIZE, STATE_SIZE).float()
    value, gradient = cuda_host.norm_and_gradient(
        states, draw(generator, STATE_SIZE, RANK).float(), upstream, 1, damping
    )
    assert torch.linalg.matrix_norm(value, 2).item() <= 1.001
    # the gradient of a step is at most 1/tau (docs/numerics.md), and the kernels take tau as 2^-25 at least
    gain = gradient.norm() * states.norm() / upstream.norm()
    assert gain <= 10 / max(damping, 2**-25)


def test_no_steep_state_of_many_spoils_itself(generator: Generator) -> None:
    """At damping 0 most directions are noise, of which a factor with inverted tiles may make more."""
    singular_values = spectrum("geometric", 60)
    states = torch.stack([state_of(generator, singular_values) for _ in range(48)]).float()
    u, v, _ = cuda_host.forward(states, draw(generator, STATE_SIZE, RANK).float(), 1, 0.0)
    norms = torch.linalg.matrix_norm(u.double() @ v.double().mT, 2)
    assert norms.max() <= 1.001
    assert norms.min() >= 0.5


@pytest.mark.parametrize("damping", [EXACT_DAMPING, DEFAULT_DAMPING])
@pytest.mark.parametrize(
    ("state_size", "rank", "batch", "power_iterations"),
    [(128, 32, (), 0), (256, 64, (2,), 1), (128, 96, (1, 1), 1), (128, 128, (1,), 1), (384, 32, (1,), 2)],
)
def test_sizes(
    generator: Generator, state_size: int, rank: int, batch: tuple[int, ...], power_iterations: int, damping: float
) -> None:
    states = state_of(generator, spectrum("geometric", 2, state_size, rank)).float().expand(*batch, -1, -1).clone()
    states *= 1 + 0.5 * torch.rand(states.shape, generator=generator)
    sketch, upstream = draw(generator, state_size, rank).float(), draw(generator, *states.shape).float()
    value, gradient = cuda_host.norm_and_gradient(states, sketch, upstream, power_iterations, damping)
    expected = svd_norm(states.double(), sketch.double(), damping, power_iterations)
    assert relative(value, expected) <= VALUE_TOLERANCE
    wanted = exact(states, sketch, upstream, damping, power_iterations)
    assert relative(gradient, wanted) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize(("state_size", "rank", "power_iterations"), [(128, 128, 0), (256, 96, 0), (128, 96, 1)])
def test_many_states_for_the_device(generator: Generator, state_size: int, rank: int, power_iterations: int) -> None:
    """Where the device is small the wide product runs, and no partial sums are made; the function is the same."""
    states = draw(generator, 2, state_size, state_size).float()
    sketch, upstream = draw(generator, state_size, rank).float(), draw(generator, *states.shape).float()
    workspaces = {
        cuda_host.kernels().forward_workspace(
            cuda_host.kernels().Sizes(
                *(2, state_size, rank, 2 + 2 * power_iterations, DEFAULT_DAMPING, multiprocessors), exact=False
            )
        )
        for multiprocessors in (1, 132)
    }
    assert len(workspaces) == 2
    value, gradient = cuda_host.norm_and_gradient(states, sketch, upstream, power_iterations, multiprocessors=1)
    expected = svd_norm(states.double(), sketch.double(), DEFAULT_DAMPING, power_iterations)
    assert relative(value, expected) <= VALUE_TOLERANCE
    wanted = exact(states, sketch, upstream, DEFAULT_DAMPING, power_iterations)
    assert relative(gradient, wanted) <= GRADIENT_TOLERANCE


def test_few_and_many_states_in_float64(generator: Generator) -> None:
    """More states than fit one group of the last step, with and without partial sums of the Gram matrices."""
    states = draw(generator, 8, STATE_SIZE, STATE_SIZE).float()
    sketch, upstream = draw(generator, STATE_SIZE, RANK).float(), draw(generator, *states.shape).float()
    nodes, _ = cuda_host.kernels().inverse_root_rule(2.0**-50, 1.0)
    assert 320 // len(nodes) < len(states)
    expected = svd_norm(states.double(), sketch.double(), 0.0, 0), exact(states, sketch, upstream, 0.0, 0)
    for multiprocessors in (1, 132):
        value, gradient = cuda_host.norm_and_gradient(states, sketch, upstream, 0, 0.0, multiprocessors)
        assert relative(value, expected[0]) <= VALUE_TOLERANCE
        assert relative(gradient, expected[1]) <= GRADIENT_TOLERANCE


def test_more_states_than_a_group(generator: Generator) -> None:
    """More states than fit one group of the last step; a damping with few nodes keeps the test short."""
    states = draw(generator, 28, STATE_SIZE, STATE_SIZE).float()
    sketch = draw(generator, STATE_SIZE, RANK).float()
    nodes, _ = cuda_host.kernels().inverse_root_rule(9e-4, 1 + 9e-4)
    assert 320 // len(nodes) < len(states)
    upstream = draw(generator, *states.shape).float()
    value, gradient = cuda_host.norm_and_gradient(states, sketch, upstream, 0, 3e-2)
    assert relative(value, svd_norm(states.double(), sketch.double(), 3e-2, 0)) <= VALUE_TOLERANCE
    assert relative(gradient, exact(states, sketch, upstream, 3e-2, 0)) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("damping", [EXACT_DAMPING, DEFAULT_DAMPING])
def test_gradients_of_u_and_of_v(generator: Generator, damping: float) -> None:
    """A loss of u u^T and one of v v^T: neither depends on the basis that the kernels choose."""
    states, sketch = draw(generator, 1, STATE_SIZE, STATE_SIZE).float(), draw(generator, STATE_SIZE, RANK).float()
    upstream = [draw(generator, STATE_SIZE, STATE_SIZE) for _ in range(2)]

    def loss(u: Tensor, v: Tensor) -> Tensor:
        return ((u @ u.mT) * upstream[0]).sum() + ((v @ v.mT) * upstream[1]).sum()

    u, v, steps = cuda_host.forward(states, sketch, 1, damping)
    leaves = u.double().requires_grad_(), v.double().requires_grad_()
    grads = torch.autograd.grad(loss(*leaves), leaves)
    ours = cuda_host.backward(grads[0].float(), grads[1].float(), states, sketch, steps, damping)
    wide = states.double().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(*reference.low_rank_polar(wide, sketch.double(), 1, damping)), wide)
    assert relative(ours, wanted) <= GRADIENT_TOLERANCE


# --- degenerate states, scale -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [EXACT_DAMPING, DEFAULT_DAMPING])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_of_a_batch_do_not_touch_each_other(generator: Generator, bad: float, damping: float) -> None:
    states, sketch = draw(generator, 3, STATE_SIZE, STATE_SIZE).float(), draw(generator, STATE_SIZE, RANK).float()
    upstream = draw(generator, *states.shape).float()
    wanted, wanted_gradient = cuda_host.norm_and_gradient(states, sketch, upstream, 1, damping)
    states[1, 2, 3] = bad
    value, gradient = cuda_host.norm_and_gradient(states, sketch, upstream, 1, damping)
    assert value[1].isnan().all()
    assert gradient[1].isnan().all()
    assert torch.equal(value[[0, 2]], wanted[[0, 2]])
    assert torch.equal(gradient[[0, 2]], wanted_gradient[[0, 2]])


@pytest.mark.parametrize("damping", [0.0, DEFAULT_DAMPING])
def test_a_zero_state_gives_zero_and_zero_gradient(generator: Generator, damping: float) -> None:
    states, sketch = draw(generator, 2, STATE_SIZE, STATE_SIZE).float(), draw(generator, STATE_SIZE, RANK).float()
    states[0] = 0
    u, v, steps = cuda_host.forward(states, sketch, 1, damping)
    assert not u[0].any()
    assert not v[0].any()
    grads = draw(generator, *u.shape).float(), draw(generator, *v.shape).float()
    gradient = cuda_host.backward(*grads, states, sketch, steps, damping)
    assert not gradient[0].any()
    assert gradient[1].isfinite().all()
    assert gradient[1].any()


@pytest.mark.parametrize("damping", [0.0, DEFAULT_DAMPING])
@pytest.mark.parametrize("exponent", [-90, -1, 29, 100])
def test_powers_of_two_change_no_bit(generator: Generator, exponent: int, damping: float) -> None:
    states, sketch = draw(generator, 1, STATE_SIZE, STATE_SIZE).float(), draw(generator, STATE_SIZE, RANK).float()
    upstream = draw(generator, *states.shape).float()
    value, gradient = cuda_host.norm_and_gradient(states, sketch, upstream, 1, damping)
    scaled_value, scaled_gradient = cuda_host.norm_and_gradient(states * 2.0**exponent, sketch, upstream, 1, damping)
    assert torch.equal(scaled_value, value)
    assert torch.equal(scaled_gradient, gradient * 2.0**-exponent)


@pytest.mark.parametrize("damping", [0.0, DEFAULT_DAMPING])
def test_the_order_of_threads_changes_no_bit(generator: Generator, damping: float) -> None:
    """The emulation draws another order in every launch: a missing barrier would show."""
    states, sketch = draw(generator, 1, STATE_SIZE, STATE_SIZE).float(), draw(generator, STATE_SIZE, 2 * RANK).float()
    upstream = draw(generator, *states.shape).float()
    first, *others = (cuda_host.norm_and_gradient(states, sketch, upstream, 1, damping) for _ in range(3))
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


def test_inputs_that_are_not_contiguous_or_aligned(generator: Generator) -> None:
    states, sketch = draw(generator, 2, STATE_SIZE, STATE_SIZE).float(), draw(generator, STATE_SIZE, RANK).float()
    upstream = draw(generator, *states.shape).float()
    shifted = torch.empty(states.numel() + 1)[1:].view(states.shape).copy_(states)
    assert shifted.data_ptr() % 16
    for damping in (EXACT_DAMPING, DEFAULT_DAMPING):
        wanted = cuda_host.norm_and_gradient(states, sketch, upstream, 1, damping)
        for other in (shifted, states.mT.contiguous().mT):
            ours = cuda_host.norm_and_gradient(other, sketch.mT.contiguous().mT, upstream, 1, damping)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, wanted, strict=True))


def test_no_states(generator: Generator) -> None:
    u, v, steps = cuda_host.forward(
        torch.empty(2, 0, STATE_SIZE, STATE_SIZE), draw(generator, STATE_SIZE, RANK).float()
    )
    assert u.shape == v.shape == (2, 0, STATE_SIZE, RANK)
    gradient = cuda_host.backward(u, v, torch.empty(2, 0, STATE_SIZE, STATE_SIZE), torch.empty(128, 32), steps, 1e-3)
    assert gradient.shape == (2, 0, STATE_SIZE, STATE_SIZE)


def test_the_transforms_are_inverse_factors(generator: Generator) -> None:
    """Y_k = X_k W_k with W W^T = (X^T X + c^2 I)^(-1) in every step, and W symmetric in the last."""
    states = state_of(generator, spectrum("geometric", 2)).float()
    _, _, steps = cuda_host.forward(states, draw(generator, STATE_SIZE, RANK).float())
    for k in range(4):
        x, w = steps.inputs[k].double(), steps.transforms[k]
        shift = DEFAULT_DAMPING**2 * x.square().sum()
        product = w @ w.mT @ (x.mT @ x + shift * torch.eye(RANK, dtype=torch.float64))
        torch.testing.assert_close(product, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-6)
        assert torch.equal(w, w.triu() if k < 3 else w.mT)


# --- the inverse square root as a sum of inverses ---------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.1, 1e2, 1e6, 1e10, 2.0**50])
def test_the_rule_for_the_inverse_square_root(ratio: float) -> None:
    nodes, weights = (torch.tensor(x, dtype=torch.float64) for x in cuda_host.kernels().inverse_root_rule(1.0, ratio))
    assert (nodes > 0).all()
    assert (weights > 0).all()
    x = torch.logspace(0, torch.log10(torch.tensor(ratio)).item(), 999, dtype=torch.float64).clamp(max=ratio)
    values = (weights / (x[:, None] + nodes)).sum(-1) * x.sqrt()
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=3e-9)


def test_what_the_kernels_do_not_take() -> None:
    unsupported = cuda_host.extension.unsupported
    assert unsupported(torch.empty(2, 256, 256), torch.empty(256, 128)) is None
    assert "float32" in unsupported(torch.empty(256, 256, dtype=torch.float64), torch.empty(256, 128))
    assert "multiple of 128" in unsupported(torch.empty(192, 192), torch.empty(192, 64))
    for rank in (16, 48, 160):
        assert f"but it is {rank}" in unsupported(torch.empty(256, 256), torch.empty(256, rank))
    assert "65535" in unsupported(torch.empty(1, device="meta").expand(70_000, 256, 256), torch.empty(256, 32))


def test_equal_singular_values(generator: Generator) -> None:
    states, sketch = 3 * orthogonal(generator, STATE_SIZE).float(), draw(generator, STATE_SIZE, RANK).float()
    value_error, gradient_error = errors(states, sketch, draw(generator, *states.shape).float(), DEFAULT_DAMPING)
    assert value_error <= VALUE_TOLERANCE
    assert gradient_error <= GRADIENT_TOLERANCE


# --- the emulation itself ---------------------------------------------------------------------------------------------


@pytest.fixture
def faults() -> ModuleType:
    return cuda_host.module("_faults", Path(__file__).parent / "emulation_faults.cpp")


@pytest.mark.parametrize(
    ("fault", "message", "kind"),
    [
        ("exception", "thrown in a thread", ValueError),
        ("memory", "bad_alloc", MemoryError),
        ("barrier", "a barrier was not reached by all threads", RuntimeError),
    ],
)
def test_a_fault_in_a_thread_is_an_error(faults: ModuleType, fault: str, message: str, kind: type[Exception]) -> None:
    """An exception that left the stack of its thread would end the process."""
    for _ in range(3):  # and the next launch runs
        with pytest.raises(kind, match=message):
            faults.run(fault)
        assert message in faults.launch(fault)
        assert faults.launch("none") == ""
