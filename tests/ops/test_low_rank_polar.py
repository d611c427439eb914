"""low_rank_polar against its plain definition, the SVD form and the released algorithm, at every kind of state.

Plain PyTorch has two forms, one for a CPU and one for a GPU. Every test runs both, on a CPU.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracles import (
    draw,
    gradients,
    orthogonal,
    precise_norm_and_gradient,
    relative,
    released_norm,
    state_of,
    svd_norm,
    well_conditioned,
)
from torch import Generator, Tensor

from gakernels import InputError, context_state, low_rank_polar
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING, eager, reference

STATE_SIZE, RANK = 32, 12


@pytest.fixture(autouse=True, params=["LAPACK", "without LAPACK"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "uses_lapack", lambda device: request.param == "LAPACK")


def norm(states: Tensor, sketch: Tensor, damping: float = DEFAULT_DAMPING, power_iterations: int = 1) -> Tensor:
    u, v = low_rank_polar(states, sketch, power_iterations, damping)
    return u @ v.mT


def reference_norm(states: Tensor, sketch: Tensor, damping: float = DEFAULT_DAMPING) -> Tensor:
    u, v = reference.low_rank_polar(states, sketch, 1, damping)
    return u @ v.mT


def from_tokens(tokens: Tensor, generator: Generator, state_size: int = STATE_SIZE) -> Tensor:
    """The state that `context_state` makes of tokens (M, d_h) with random projections."""
    width = tokens.shape[-1]
    a2, b1 = draw(generator, state_size, width) / width**0.5, draw(generator, width, state_size) / width**0.5
    return context_state(tokens[None, None], a2, b1)[0, 0]


def eight_tokens(generator: Generator) -> Tensor:
    return from_tokens(draw(generator, 8, 256), generator)


def identical_tokens(generator: Generator) -> Tensor:
    return from_tokens(draw(generator, 1, 256).expand(20, 256), generator)


def empty_first_chunk(generator: Generator) -> Tensor:
    """A batch of three states, the first of a chunk whose tokens are all masked."""
    hidden, mask = draw(generator, 1, 3, 5, 256), torch.ones(1, 3, 5, dtype=torch.bool)
    mask[0, 0] = False
    return context_state(hidden, draw(generator, STATE_SIZE, 256) / 16, draw(generator, 256, STATE_SIZE) / 16, mask)[0]


DEGENERATE: dict[str, Callable[[Generator], Tensor]] = {
    "orthogonal": lambda g: 3 * orthogonal(g, STATE_SIZE),
    "identity": lambda g: torch.eye(STATE_SIZE, dtype=torch.float64),
    "one pair of equal values": lambda g: state_of(g, torch.tensor([2.0, 2.0] + [1.0] * 2 + [0.5] * (STATE_SIZE - 4))),
    "8 tokens": eight_tokens,
    "identical tokens": identical_tokens,
    "empty first chunk": empty_first_chunk,
    "zero": lambda g: torch.zeros(STATE_SIZE, STATE_SIZE, dtype=torch.float64),
    "one entry": lambda g: torch.zeros(STATE_SIZE, STATE_SIZE, dtype=torch.float64).index_put(
        (torch.tensor(3), torch.tensor(5)), torch.tensor(-2.0, dtype=torch.float64)
    ),
}


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize(("size", "rank"), [(1, 1), (7, 1), (9, 4), (8, 8), (33, 13)])
@pytest.mark.parametrize("damping", [DEFAULT_DAMPING, 3e-2])
def test_equals_both_definitions_in_float64(
    generator: Generator, batch: tuple[int, ...], size: int, rank: int, damping: float
) -> None:
    states, sketch = well_conditioned(generator, *batch, size, size), well_conditioned(generator, size, rank)
    u, v = low_rank_polar(states, sketch, 1, damping)
    assert u.shape == v.shape == (*batch, size, rank)
    for definition in (svd_norm(states, sketch, damping), reference_norm(states, sketch, damping)):
        torch.testing.assert_close(u @ v.mT, definition, rtol=0, atol=1e-10)


@pytest.mark.parametrize("power_iterations", [0, 1, 2, 3])
def test_power_iterations(generator: Generator, power_iterations: int) -> None:
    states, sketch = draw(generator, 2, 14, 14), draw(generator, 14, 5)
    ours = norm(states, sketch, power_iterations=power_iterations)
    wanted = svd_norm(states, sketch, DEFAULT_DAMPING, power_iterations)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)
    if power_iterations:
        assert relative(svd_norm(states, sketch, DEFAULT_DAMPING, power_iterations - 1), wanted) > 1e-3


@pytest.mark.parametrize("kind", DEGENERATE)
def test_equals_both_definitions_at_degenerate_states(generator: Generator, kind: str) -> None:
    states, sketch = DEGENERATE[kind](generator), draw(generator, STATE_SIZE, RANK)
    ours = norm(states, sketch)
    torch.testing.assert_close(ours, svd_norm(states, sketch, DEFAULT_DAMPING), rtol=0, atol=1e-9)
    torch.testing.assert_close(ours, reference_norm(states, sketch), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (6, 1), (9, 4), (7, 7), (33, 13)])
@pytest.mark.parametrize("damping", [DEFAULT_DAMPING, 3e-2])
def test_gradient_equals_autograd_of_the_definition(generator: Generator, size: int, rank: int, damping: float) -> None:
    states, sketch = well_conditioned(generator, 2, size, size), well_conditioned(generator, size, rank)
    upstream = draw(generator, 2, size, size)
    # The bases of the two differ by a rotation, so only products that don't see it are compared.
    for left, right in ((0, 1), (0, 0), (1, 1)):

        def product(f: Callable[..., tuple[Tensor, ...]], s: Tensor) -> Tensor:
            factors = f(s, sketch, 1, damping)
            return factors[left] @ factors[right].mT  # noqa: B023

        ours, wanted = (
            gradients(partial(product, f), upstream, states)[0] for f in (low_rank_polar, reference.low_rank_polar)
        )
        torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-10 * max(1.0, wanted.abs().max().item()))


def test_gradcheck_of_each_factor_alone(generator: Generator) -> None:
    """A loss may also see the basis, which is a smooth function of the state."""
    states, sketch = well_conditioned(generator, 2, 8, 8).requires_grad_(), well_conditioned(generator, 8, 4)
    assert torch.autograd.gradcheck(lambda s: low_rank_polar(s, sketch), states, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("kind", DEGENERATE)
def test_gradient_equals_autograd_at_degenerate_states(generator: Generator, kind: str) -> None:
    states, sketch = DEGENERATE[kind](generator), draw(generator, STATE_SIZE, RANK)
    upstream = draw(generator, *states.shape)
    (ours,) = gradients(lambda s: norm(s, sketch), upstream, states)
    (wanted,) = gradients(lambda s: reference_norm(s, sketch), upstream, states)
    # autograd through the definition is the one that errs here, by up to 1e-5; see the test with 50 digits
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("rank_of_state", [1, 2, 3, 5])
@pytest.mark.parametrize("damping", [DEFAULT_DAMPING, 3e-2])
def test_value_and_gradient_equal_those_of_fifty_digits(
    generator: Generator, rank_of_state: int, damping: float
) -> None:
    states = draw(generator, 5, rank_of_state) @ draw(generator, rank_of_state, 5)
    if rank_of_state == 5:
        states = orthogonal(generator, 5)
    sketch, upstream = draw(generator, 5, 3), draw(generator, 5, 5)
    value, gradient = precise_norm_and_gradient(states, sketch, damping, upstream)
    torch.testing.assert_close(norm(states, sketch, damping), value, rtol=0, atol=1e-10)
    (ours,) = gradients(lambda s: norm(s, sketch, damping), upstream, states)
    torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-9 * max(1.0, gradient.abs().max().item()))


@pytest.mark.parametrize("rank_of_state", [1, 3, 8])
@pytest.mark.parametrize("damping", [DEFAULT_DAMPING, 3e-2])
def test_gradcheck_at_states_of_every_rank(generator: Generator, rank_of_state: int, damping: float) -> None:
    states = draw(generator, 2, 8, rank_of_state) @ draw(generator, 2, rank_of_state, 8)
    sketch = draw(generator, 8, 4)
    states[1] = state_of(generator, torch.tensor([1.0] * rank_of_state + [0.0] * (8 - rank_of_state)))
    assert torch.autograd.gradcheck(lambda s: norm(s, sketch, damping), states.requires_grad_(), eps=1e-7, atol=1e-4)


def test_states_that_are_not_contiguous(generator: Generator) -> None:
    states, sketch = draw(generator, 2, 3, 12, 12), draw(generator, 12, 5)
    strided = states.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)
    strided_sketch = sketch.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert not strided_sketch.is_contiguous()
    upstream = draw(generator, 2, 3, 12, 12)
    torch.testing.assert_close(norm(strided, strided_sketch), norm(states, sketch), rtol=0, atol=1e-12)
    leaf = strided.requires_grad_()
    (ours,) = torch.autograd.grad(norm(leaf, strided_sketch), leaf, upstream.mT.contiguous().mT)
    (wanted,) = gradients(lambda s: norm(s, sketch), upstream, states)
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-10)


def test_the_sketch_gets_no_gradient(generator: Generator) -> None:
    states, sketch = draw(generator, 9, 9).requires_grad_(), draw(generator, 9, 3).requires_grad_()
    norm(states, sketch).sum().backward()
    assert states.grad is not None
    assert sketch.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_spoils_no_other(generator: Generator, bad: float) -> None:
    states, sketch = draw(generator, 3, 9, 9), draw(generator, 9, 3)
    wanted = norm(states, sketch)
    states[1, 2, 3] = bad
    ours = norm(states, sketch)
    assert ours[1].isnan().all()
    assert torch.equal(ours[[0, 2]], wanted[[0, 2]])


# --- damping = 0: the released algorithm ------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rank"), [(8, 8), (24, 6), (65, 17)])
def test_without_damping_it_is_the_released_algorithm(generator: Generator, size: int, rank: int) -> None:
    spectrum = 1 - 0.9 * torch.arange(size, dtype=torch.float64) / size  # distinct, well conditioned
    states, sketch = state_of(generator, spectrum), well_conditioned(generator, size, rank)
    upstream = draw(generator, size, size)
    torch.testing.assert_close(norm(states, sketch, 0.0), released_norm(states, sketch), rtol=0, atol=1e-8)
    (ours,) = gradients(lambda s: norm(s, sketch, 0.0), upstream, states)
    (wanted,) = gradients(lambda s: released_norm(s, sketch), upstream, states)
    assert relative(ours, wanted) <= 1e-8


def test_the_released_algorithm_here_is_that_of_pytorch(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    states, sketch = draw(generator, 20, 20), draw(generator, 20, 6)
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: sketch)
    u, _, v = torch.svd_lowrank(states, q=6, niter=1)
    torch.testing.assert_close(u @ v.mT, released_norm(states, sketch), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("size", "rank"), [(256, 32), (256, 128)])
def test_float32_over_four_decades(generator: Generator, size: int, rank: int) -> None:
    spectrum = 10 ** (-4 * torch.arange(size, dtype=torch.float64) / (rank - 1))
    states = state_of(generator, spectrum).float()
    sketch, upstream = draw(generator, size, rank).float(), draw(generator, size, size).float()
    exact = released_norm(states.double(), sketch.double())
    assert relative(norm(states, sketch, 0.0), exact) <= 1e-5
    assert relative(norm(states, sketch, 0.0), norm(states.double(), sketch.double(), 0.0)) <= 1e-5
    (ours,) = gradients(lambda s: norm(s, sketch, 0.0), upstream, states)
    (wanted,) = gradients(lambda s: norm(s, sketch.double(), 0.0), upstream.double(), states.double())
    assert relative(ours, wanted) <= 1e-4


@pytest.mark.parametrize(("damping", "dtype"), [(0.0, torch.float64), (9e-4, torch.float64), (1e-3, torch.float32)])
def test_float32_states_are_computed_in_float64_for_a_small_damping(
    generator: Generator, damping: float, dtype: torch.dtype
) -> None:
    states, sketch = draw(generator, 2, 12, 12).float(), draw(generator, 12, 4).float()
    u, v, inputs, *_ = torch.ops.gakernels.low_rank_polar(states, sketch, 1, damping, "eager")
    assert u.dtype == v.dtype == torch.float32
    assert inputs.dtype == dtype
    (gradient,) = gradients(lambda s: norm(s, sketch, damping), draw(generator, 2, 12, 12).float(), states)
    assert gradient.dtype == torch.float32


def test_float32_over_four_decades_with_damping(generator: Generator) -> None:
    spectrum = 10 ** (-4 * torch.arange(256, dtype=torch.float64) / 31)
    states, sketch = state_of(generator, spectrum).float(), draw(generator, 256, 32).float()
    upstream = draw(generator, 256, 256).float()
    wide = states.double(), sketch.double()
    assert relative(norm(states, sketch), svd_norm(*wide, DEFAULT_DAMPING)) <= 1e-3
    (ours,) = gradients(lambda s: norm(s, sketch), upstream, states)
    (wanted,) = gradients(lambda s: norm(s, wide[1]), upstream.double(), wide[0])
    assert relative(ours, wanted) <= 1e-2


# --- the default damping ----------------------------------------------------------------------------------------------


def test_eight_tokens_give_the_polar_factor_of_the_rank_eight_state(generator: Generator) -> None:
    states, sketch = eight_tokens(generator), draw(generator, STATE_SIZE, RANK)
    p, s, qt = torch.linalg.svd(states)
    assert s[7] > 1e3 * s[8]
    assert relative(norm(states, sketch), p[:, :8] @ qt[:8]) <= 0.01


def test_a_repeated_token_gives_norm_one(generator: Generator) -> None:
    states, sketch = identical_tokens(generator), draw(generator, STATE_SIZE, RANK)
    value = norm(states, sketch)
    assert abs(torch.linalg.matrix_norm(value, 2).item() - 1) <= 0.01
    assert relative(value, states / states.norm()) <= 0.01


def test_equal_singular_values_give_rank_many_ones(generator: Generator) -> None:
    sketch = draw(generator, STATE_SIZE, RANK)
    values = torch.linalg.svdvals(norm(7 * orthogonal(generator, STATE_SIZE), sketch))
    torch.testing.assert_close(values[:RANK], torch.ones_like(values[:RANK]), rtol=0, atol=0.01)
    assert (values[RANK:] < 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("damping", [0.0, DEFAULT_DAMPING])
def test_a_zero_state_gives_zero_and_zero_gradient(generator: Generator, dtype: torch.dtype, damping: float) -> None:
    states = torch.stack([torch.zeros(9, 9), draw(generator, 9, 9)]).to(dtype).requires_grad_()
    sketch, upstream = draw(generator, 9, 4, dtype=dtype), draw(generator, 2, 9, 9, dtype=dtype)
    u, v = low_rank_polar(states, sketch, damping=damping)
    assert (u[0] == 0).all()
    assert (v[0] == 0).all()
    (gradient,) = torch.autograd.grad(u @ v.mT, states, upstream)
    assert (gradient[0] == 0).all()
    assert gradient[1].isfinite().all()
    assert gradient[1].norm() > 0


@pytest.mark.parametrize("kind", DEGENERATE)
def test_gradients_are_bounded_and_unmoved_by_rounding_noise(generator: Generator, kind: str) -> None:
    states, sketch = DEGENERATE[kind](generator), draw(generator, STATE_SIZE, RANK)
    upstream = draw(generator, *states.shape)
    noise = 1e-15 * draw(generator, *states.shape)
    size = torch.linalg.matrix_norm(states)[..., None, None]
    (gradient,) = gradients(lambda s: norm(s, sketch), upstream, states)
    gain = torch.linalg.matrix_norm(gradient) * size.squeeze() / torch.linalg.matrix_norm(upstream)
    assert (gain <= 100).all()
    # noise relative to each entry keeps zeros; noise relative to the norm fills the null space
    for disturbed in (states * (1 + noise), states + size / STATE_SIZE * noise):
        (moved,) = gradients(lambda s: norm(s, sketch), upstream, disturbed)
        assert (moved - gradient).norm() <= 0.01 * gradient.norm()
        assert (norm(disturbed, sketch) - norm(states, sketch)).norm() <= 1e-6


# --- scale ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("exponent", [-100, -37, -1, 1, 2, 29, 90])
def test_powers_of_two_change_no_bit(generator: Generator, dtype: torch.dtype, exponent: int) -> None:
    states, sketch = draw(generator, 2, 20, 20, dtype=dtype), draw(generator, 20, 6, dtype=dtype)
    upstream = draw(generator, 2, 20, 20, dtype=dtype)
    for mine, plain in zip(low_rank_polar(states * 2.0**exponent, sketch), low_rank_polar(states, sketch), strict=True):
        assert torch.equal(mine, plain)
    (scaled,) = gradients(lambda s: norm(s, sketch), upstream, states * 2.0**exponent)
    (plain,) = gradients(lambda s: norm(s, sketch), upstream, states)
    assert torch.equal(scaled, plain * 2.0**-exponent)


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [(torch.float32, (1e-30, 1e-20, 1e12, 1e36)), (torch.float64, (1e-290, 1e-20, 1e12, 1e300))],
)
def test_other_scales_change_only_the_rounding(
    generator: Generator, dtype: torch.dtype, scales: tuple[float, ...]
) -> None:
    spectrum = 0.1 + torch.rand(20, generator=generator, dtype=torch.float64)
    states, sketch = state_of(generator, spectrum).to(dtype), draw(generator, 20, 6, dtype=dtype)
    upstream, rounding = draw(generator, 20, 20, dtype=dtype), 1000 * torch.finfo(dtype).eps
    (plain,) = gradients(lambda s: norm(s, sketch), upstream, states)
    for scale in scales:
        assert relative(norm(states * scale, sketch), norm(states, sketch)) <= rounding
        (scaled,) = gradients(lambda s: norm(s, sketch), upstream, states * scale)
        assert relative(scaled.double() * scale, plain) <= rounding


@pytest.mark.parametrize("rank", [1, 6])
def test_a_batch_of_scales_a_thousand_decades_apart(generator: Generator, rank: int) -> None:
    states, sketch = draw(generator, 5, 12, 12), draw(generator, 12, rank)
    scales = torch.tensor([1e-300, 1e-60, 0.0, 1.0, 1e300], dtype=torch.float64)
    wanted = norm(states, sketch) * (scales != 0)[:, None, None]
    torch.testing.assert_close(norm(states * scales[:, None, None], sketch), wanted, rtol=0, atol=1e-11)


# --- precision, input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decades", [0, 1, 2, 3])
def test_float32_is_as_good_as_plain_pytorch(generator: Generator, decades: int) -> None:
    """Medians over a few states: the errors of a single one scatter by more than the factor of two asked for."""
    spectrum = 10 ** (-decades * torch.arange(64, dtype=torch.float64) / 15) * (1 - torch.arange(64) / 640)
    value_errors, gradient_errors = [], []
    for _ in range(9):
        states, sketch = state_of(generator, spectrum).float(), draw(generator, 64, 16).float()
        upstream, wide_sketch = draw(generator, 64, 64).float(), sketch.double()
        exact = svd_norm(states.double(), wide_sketch, DEFAULT_DAMPING)
        (true,) = gradients(lambda s: reference_norm(s, wide_sketch), upstream.double(), states.double())  # noqa: B023
        plain_norm = partial(svd_norm, sketch=sketch, damping=DEFAULT_DAMPING)
        functions = partial(norm, sketch=sketch), plain_norm
        value_errors.append([relative(f(states), exact) for f in functions])
        gradient_errors.append([relative(gradients(f, upstream, states)[0], true) for f in functions])
    for errors in (value_errors, gradient_errors):
        ours, plain = torch.tensor(errors).median(0).values.tolist()
        assert ours <= 2 * plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.ones(4)}, r"states must have shape \(\.\.\., d_r, d_r\), but it has \(4,\)"),
        ({"states": torch.ones(2, 4, 5)}, r"states must have shape \(\.\.\., d_r, d_r\), but it has \(2, 4, 5\)"),
        ({"states": torch.ones(4, 4, dtype=torch.bfloat16)}, "states must be torch.float32 or torch.float64"),
        ({"states": torch.ones(4, 4, dtype=torch.int64)}, "states must be torch.float32 or torch.float64"),
        ({"sketch": torch.ones(5, 2)}, r"sketch must have shape \(4, r\)"),
        ({"sketch": torch.ones(1, 4, 2)}, r"sketch must have shape \(4, r\)"),
        ({"sketch": torch.ones(4, 5)}, "sketch must have a rank r between 1 and d_r"),
        ({"sketch": torch.ones(4, 0)}, "sketch must have a rank r between 1 and d_r"),
        ({"sketch": torch.ones(4, 2, dtype=torch.float64)}, "sketch must be torch.float32 like states"),
        ({"sketch": torch.ones(4, 2, device="meta")}, "sketch must be on cpu like states"),
        ({"power_iterations": -1}, "power_iterations must be at least 0, but it is -1"),
        ({"damping": -1e-3}, "damping must be finite and at least 0"),
        ({"damping": float("nan")}, "damping must be finite and at least 0"),
        ({"damping": float("inf")}, "damping must be finite and at least 0"),
    ],
)
def test_wrong_input_names_the_argument(change: dict[str, object], message: str) -> None:
    arguments = {"states": torch.eye(4), "sketch": torch.eye(4)[:, :2]}
    low_rank_polar(**arguments)
    with pytest.raises(InputError, match=message):
        low_rank_polar(**{**arguments, **change})
