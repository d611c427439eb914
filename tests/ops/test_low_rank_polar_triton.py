"""The Triton kernels of low_rank_polar against the float64 definition, and no worse than plain PyTorch in float32.

Without a GPU the interpreter runs them, at tens of milliseconds a Cholesky factor: the cases are few and small. A state
of 70 has a tail in every tile, and more than one block of rows.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracles import draw, gradients, orthogonal, relative, released_norm, state_of, svd_norm, well_conditioned
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from gakernels import InputError, low_rank_polar
from gakernels.errors import BackendError
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING, reference

polar_triton = pytest.importorskip("gakernels.ops.low_rank_polar.triton", exc_type=ImportError)
pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("triton_backend")]

FEW_POLES = 0.5  # a damping whose inverse root has few poles, for cases about something else
ROUNDING = 1e-6  # a few roundings of float32: what products and Gram matrices of well-conditioned states leave


def norm(states: Tensor, sketch: Tensor, damping: float = DEFAULT_DAMPING, power_iterations: int = 1) -> Tensor:
    u, v = low_rank_polar(states, sketch, power_iterations, damping)
    return u @ v.mT


def true_norm(states: Tensor, sketch: Tensor, damping: float = DEFAULT_DAMPING, power_iterations: int = 1) -> Tensor:
    u, v = reference.low_rank_polar(states.double(), sketch.double(), power_iterations, damping)
    return u @ v.mT


def eager_norm(states: Tensor, sketch: Tensor, damping: float = DEFAULT_DAMPING, power_iterations: int = 1) -> Tensor:
    u, v, *_ = torch.ops.gakernels.low_rank_polar(states, sketch, power_iterations, damping, "eager")
    return u @ v.mT


def value_and_gradient(function: Callable[[Tensor], Tensor], states: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = states.detach().requires_grad_()
    value = function(leaf)
    return value.detach(), torch.autograd.grad(value, leaf, upstream)[0]


def assert_right(states: Tensor, sketch: Tensor, upstream: Tensor, damping: float, power_iterations: int = 1) -> None:
    """Value and gradient are those of the definition, to at most twice the error of the eager form and ROUNDING."""
    options = {"sketch": sketch, "damping": damping, "power_iterations": power_iterations}
    ours, plain = (value_and_gradient(partial(f, **options), states, upstream) for f in (norm, eager_norm))
    exact = value_and_gradient(partial(true_norm, **options), states.double(), upstream.double())
    assert relative(ours[0], exact[0]) <= 2 * relative(plain[0], exact[0]) + ROUNDING
    # A gradient may vanish, as for a number, whose norm is a constant: then ||G|| / ||S|| is what it is small beside.
    size = max(exact[1].norm().item(), (upstream.double().norm() / states.double().norm()).item())
    ours_error, plain_error = ((found[1].double() - exact[1]).norm().item() / size for found in (ours, plain))
    assert ours_error <= 2 * plain_error + 2 * ROUNDING


def drawn(
    generator: Generator, device: torch.device, batch: tuple[int, ...], size: int, rank: int
) -> tuple[Tensor, ...]:
    """Well-conditioned states, a sketch and an upstream gradient of the product."""
    tensors = well_conditioned(generator, *batch, size, size), well_conditioned(generator, size, rank)
    return *(tensor.float().to(device) for tensor in tensors), draw(generator, *batch, size, size).float().to(device)


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "size", "rank", "damping", "power_iterations"),
    [
        ((), 1, 1, DEFAULT_DAMPING, 1),
        ((2,), 9, 9, 0.1, 1),
        ((1, 2), 70, 5, 0.1, 0),
        ((1,), 70, 24, 0.1, 1),
        ((1,), 33, 16, 0.1, 2),
        ((2, 0), 20, 6, DEFAULT_DAMPING, 1),
        ((1,), 20, 6, 0.0, 1),
        ((1,), 12, 4, 10.0, 0),
    ],
)
def test_value_and_gradient(
    generator: Generator,
    device: torch.device,
    batch: tuple[int, ...],
    size: int,
    rank: int,
    damping: float,
    power_iterations: int,
) -> None:
    states, sketch, upstream = drawn(generator, device, batch, size, rank)
    u, v = low_rank_polar(states, sketch, power_iterations, damping)
    assert u.shape == v.shape == (*batch, size, rank)
    assert u.is_contiguous()
    assert v.is_contiguous()
    if states.numel():
        assert_right(states, sketch, upstream, damping, power_iterations)


@pytest.mark.parametrize("rank", [40, 128])
def test_ranks_of_several_blocks(generator: Generator, device: torch.device, rank: int) -> None:
    states, sketch, upstream = drawn(generator, device, (1,), 130, rank)
    assert_right(states, sketch, upstream, 2.0, 0)  # three poles


DEGENERATE: dict[str, Callable[[Generator], Tensor]] = {
    "orthogonal": lambda g: 3 * orthogonal(g, 20),
    "rank 3": lambda g: draw(g, 20, 3) @ draw(g, 3, 20),
    "rank 1": lambda g: draw(g, 20, 1) @ draw(g, 1, 20),
    "one entry": lambda g: torch.zeros(20, 20, dtype=torch.float64).index_put(
        (torch.tensor(3), torch.tensor(5)), torch.tensor(-2.0, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_states(generator: Generator, device: torch.device, kind: str) -> None:
    states, sketch = DEGENERATE[kind](generator).float().to(device), draw(generator, 20, 7).float().to(device)
    assert_right(states, sketch, draw(generator, 20, 20).float().to(device), DEFAULT_DAMPING)


def test_a_steep_spectrum_is_as_good_as_plain_pytorch(generator: Generator, device: torch.device) -> None:
    """Medians over a few states: the errors of a single one scatter by more than the factor of two asked for."""
    spectrum = 10 ** (-3 * torch.arange(40, dtype=torch.float64) / 7) * (1 - torch.arange(40) / 400)
    errors = []
    for _ in range(5):
        states, sketch = (x.float().to(device) for x in (state_of(generator, spectrum), draw(generator, 40, 8)))
        upstream = draw(generator, 40, 40).float().to(device)
        exact = value_and_gradient(partial(true_norm, sketch=sketch), states.double(), upstream.double())
        for f in partial(norm, sketch=sketch), partial(svd_norm, sketch=sketch, damping=DEFAULT_DAMPING):
            found = value_and_gradient(f, states, upstream)
            errors.append([relative(found[i], exact[i]) for i in range(2)])
    ours, plain = torch.tensor(errors).view(5, 2, 2).median(0).values
    assert (ours <= 2 * plain).all()


def test_four_decades_without_damping(generator: Generator, device: torch.device) -> None:
    spectrum = 10 ** (-4 * torch.arange(40, dtype=torch.float64) / 7)
    states, sketch = (x.float().to(device) for x in (state_of(generator, spectrum), draw(generator, 40, 8)))
    assert relative(norm(states, sketch, 0.0), released_norm(states.double(), sketch.double())) <= 0.02


def test_a_zero_state_gives_zero_and_zero_gradient(generator: Generator, device: torch.device) -> None:
    states = torch.stack([torch.zeros(9, 9), draw(generator, 9, 9).float()]).to(device).requires_grad_()
    for damping in (0.0, DEFAULT_DAMPING):
        u, v = low_rank_polar(states, draw(generator, 9, 4).float().to(device), 0, damping)
        assert (u[0] == 0).all()
        assert (v[0] == 0).all()
        (gradient,) = torch.autograd.grad(u @ v.mT, states, draw(generator, 2, 9, 9).float().to(device))
        assert (gradient[0] == 0).all()
        assert gradient[1].isfinite().all()
        assert gradient[1].norm() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_that_is_not_finite_spoils_no_other(generator: Generator, device: torch.device, bad: float) -> None:
    states, sketch, upstream = drawn(generator, device, (3,), 18, 5)
    function = partial(norm, sketch=sketch, damping=FEW_POLES, power_iterations=0)
    wanted = value_and_gradient(function, states, upstream)
    states[1, 0, 0] = bad  # what follows the last entry of the state before
    for ours, plain in zip(value_and_gradient(function, states, upstream), wanted, strict=True):
        assert ours[1].isnan().any()
        assert torch.equal(ours[[0, 2]], plain[[0, 2]])
    assert function(states)[1].isnan().all()


@pytest.mark.parametrize("exponent", [-100, 90])
def test_powers_of_two_change_no_bit(generator: Generator, device: torch.device, exponent: int) -> None:
    states, sketch, upstream = drawn(generator, device, (1,), 20, 6)
    function = partial(norm, sketch=sketch, damping=FEW_POLES, power_iterations=0)
    value, gradient = value_and_gradient(function, states, upstream)
    scaled_value, scaled_gradient = value_and_gradient(function, states * 2.0**exponent, upstream)
    assert torch.equal(scaled_value, value)
    assert torch.equal(scaled_gradient, gradient * 2.0**-exponent)


def test_scales_far_apart_in_a_batch(generator: Generator, device: torch.device) -> None:
    states, sketch, _ = drawn(generator, device, (3,), 12, 4)
    scales = torch.tensor([1e-36, 0.0, 1e36], device=device)[:, None, None]
    wanted = true_norm(states, sketch, FEW_POLES, 0) * (scales != 0)
    assert (norm(states * scales, sketch, FEW_POLES, 0) - wanted).abs().max() <= 1e-5


def test_many_states_share_programs(
    generator: Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are more terms than programs at once, a program adds up several."""
    states, sketch, upstream = drawn(generator, device, (2,), 12, 4)
    function = partial(norm, sketch=sketch, damping=FEW_POLES, power_iterations=0)
    apart = value_and_gradient(function, states, upstream)
    monkeypatch.setattr(polar_triton, "PROGRAMS", 4)
    for ours, wanted in zip(value_and_gradient(function, states, upstream), apart, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_layouts_and_repetition(generator: Generator, device: torch.device) -> None:
    states, sketch, upstream = drawn(generator, device, (2, 2), 18, 5)
    strided = states.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)
    assert not strided.is_contiguous()
    function = partial(norm, damping=FEW_POLES, power_iterations=0)
    first, again = (value_and_gradient(partial(function, sketch=sketch), states, upstream) for _ in range(2))
    other = value_and_gradient(partial(function, sketch=sketch.mT.contiguous().mT), strided, upstream)
    for i in range(2):
        assert torch.equal(first[i], again[i])
        assert torch.equal(first[i], other[i])


def test_a_loss_that_sees_the_basis(generator: Generator, device: torch.device) -> None:
    """Both forms take the Cholesky factor with a positive diagonal, so they agree on u and v too."""
    states, sketch, _ = drawn(generator, device, (1,), 14, 4)
    grads = [draw(generator, 1, 14, 4).to(device) for _ in range(2)]
    gradient = []
    for backend, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        leaf = states.to(dtype).requires_grad_()
        u, v, *_ = torch.ops.gakernels.low_rank_polar(leaf, sketch.to(dtype), 1, FEW_POLES, backend)
        gradient += torch.autograd.grad((u, v), leaf, [grad.to(dtype) for grad in grads])
    assert relative(gradient[0], gradient[1]) <= 1e-5


@pytest.mark.parametrize("damping", [0.0, 1e-5, 1e-3, 3e-2, 1.0, 100.0])
@pytest.mark.parametrize("error", [3e-8, 2.5e-9])
def test_the_poles_give_the_inverse_square_root(damping: float, error: float) -> None:
    poles, weights = polar_triton.inverse_root_poles(damping, error, polar_triton.LARGEST_CONDITION)
    lower = max(damping**2, 2 / polar_triton.LARGEST_CONDITION)
    x = torch.logspace(math.log10(lower), math.log10(1 + damping**2), 2000, dtype=torch.float64)
    value, slope = (sum(w / (x + s) ** p for s, w in zip(poles, weights, strict=True)) for p in (1, 2))
    assert (value * x.sqrt() - 1).abs().max() <= 1.1 * error
    assert (2 * slope * x**1.5 - 1).abs().max() <= 50 * error
    assert all(weight > 0 for weight in weights)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def test_opcheck(generator: Generator, device: torch.device) -> None:
    states, sketch, _ = drawn(generator, device, (1,), 8, 3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = states.requires_grad_(), sketch, 0, FEW_POLES, "triton"
    torch.library.opcheck(torch.ops.gakernels.low_rank_polar.default, arguments, test_utils=tests)


def test_compile_autocast_and_checkpoint(generator: Generator, device: torch.device) -> None:
    states, sketch, upstream = drawn(generator, device, (1,), 8, 3)
    function = partial(norm, sketch=sketch, damping=FEW_POLES, power_iterations=0)
    wanted = gradients(function, upstream, states)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def under_autocast(s: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            u, v = low_rank_polar(s, sketch, 0, FEW_POLES)
        return u @ v.mT

    for f in (compiled, under_autocast, lambda s: checkpoint(function, s, use_reentrant=False)):
        torch.testing.assert_close(gradients(f, upstream, states)[0], wanted, rtol=0, atol=0)


def test_what_they_do_not_take(generator: Generator, device: torch.device) -> None:
    states = draw(generator, 130, 130).to(device)
    with pytest.raises(BackendError, match="float32 states"):
        low_rank_polar(states, states[:, :2])
    with pytest.raises(BackendError, match="rank of at most 128, but it is 129"):
        low_rank_polar(states.float(), states[:, :129].float())
    with pytest.raises(BackendError, match="damping of at most 1e\\+06, but it is 1e\\+07"):
        low_rank_polar(states.float(), states[:, :2].float(), 1, 1e7)
    with pytest.raises(InputError, match="damping"):
        low_rank_polar(states.float(), states[:, :2].float(), 1, -1.0)
