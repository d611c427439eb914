"""context_state against its plain definition, an independent one, and the bounds of its memory and rounding."""

from collections.abc import Callable

import pytest
import torch
from oracles import assert_as_good_as, draw, gradients, plain_states, relative
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gakernels import InputError, context_state
from gakernels.ops.context_state import eager, reference

SHAPES = [  # B, T, M, d_h, d_r
    (1, 1, 1, 1, 1),
    (1, 1, 5, 3, 4),
    (2, 3, 7, 5, 3),
    (3, 9, 1, 6, 5),
    (2, 9, 4, 7, 2),
]


def inputs(generator: Generator, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, a2, b1, a mask that keeps about two thirds, initial_state."""
    batch, chunks, tokens, hidden_size, state_size = shape
    return (
        draw(generator, batch, chunks, tokens, hidden_size),
        draw(generator, state_size, hidden_size),
        draw(generator, hidden_size, state_size),
        torch.rand(batch, chunks, tokens, generator=generator) < 2 / 3,
        draw(generator, batch, state_size, state_size),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("continued", [False, True])
def test_equals_both_definitions_in_float64(
    generator: Generator, shape: tuple[int, ...], masked: bool, continued: bool
) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, shape)
    mask, initial = mask if masked else None, initial if continued else None
    expected = plain_states(hidden, a2, b1, mask, initial)
    torch.testing.assert_close(context_state(hidden, a2, b1, mask, initial), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(reference.context_state(hidden, a2, b1, mask, initial), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_every_gradient_equals_that_of_both_definitions(
    generator: Generator, shape: tuple[int, ...], masked: bool
) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, shape)
    mask = mask if masked else None

    def with_mask(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda hidden, a2, b1, initial: function(hidden, a2, b1, mask, initial)

    upstream = draw(generator, *context_state(hidden, a2, b1).shape)
    ours = gradients(with_mask(context_state), upstream, hidden, a2, b1, initial)
    for definition in (plain_states, reference.context_state):
        wanted = gradients(with_mask(definition), upstream, hidden, a2, b1, initial)
        for mine, theirs in zip(ours, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_gradcheck(generator: Generator) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, (2, 3, 4, 3, 2))
    mask[0, 0] = False
    variables = [value.requires_grad_() for value in (hidden, a2, b1, initial)]
    assert torch.autograd.gradcheck(lambda h, a, b, s: context_state(h, a, b, mask, s), variables)
    assert torch.autograd.gradcheck(context_state, variables[:3])


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some_inputs_only(generator: Generator, needed: tuple[int, ...]) -> None:
    values = inputs(generator, (2, 3, 4, 5, 3))[:3]
    upstream = draw(generator, 2, 3, 3, 3)
    everything = gradients(context_state, upstream, *values)
    leaves = [value.clone().requires_grad_(i in needed) for i, value in enumerate(values)]
    context_state(*leaves).backward(upstream)
    for i, leaf in enumerate(leaves):
        if i in needed:
            torch.testing.assert_close(leaf.grad, everything[i], rtol=1e-12, atol=1e-12)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_masked_tokens_may_hold_anything(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, rubbish: float, backend: str
) -> None:
    monkeypatch.setenv("GAKERNELS_BACKEND", backend)
    hidden, a2, b1, mask, _ = inputs(generator, (2, 4, 5, 6, 3))
    mask[0, 0] = False  # a fully masked first chunk
    mask[1, 2] = False
    upstream = draw(generator, 2, 4, 3, 3)

    def run(filling: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        filled = hidden.masked_fill(~mask[..., None], filling)
        function = lambda h, a, b: context_state(h, a, b, mask)  # noqa: E731
        return function(filled, a2, b1), gradients(function, upstream, filled, a2, b1)

    states, (grad_hidden, grad_a2, grad_b1) = run(rubbish)
    clean_states, clean_gradients = run(0.0)
    assert torch.equal(states, clean_states)
    assert states.isfinite().all()
    assert (states[0, 0] == 0).all()
    assert torch.equal(states[1, 2], states[1, 1])
    assert (grad_hidden[~mask] == 0).all()
    for mine, clean in zip((grad_hidden, grad_a2, grad_b1), clean_gradients, strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, clean)


def test_everything_masked_gives_zero_and_zero_gradients(generator: Generator) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, (2, 3, 4, 5, 3))
    mask[:] = False
    states = context_state(hidden, a2, b1, mask, initial)
    assert torch.equal(states, initial[:, None].expand_as(states))
    assert (context_state(hidden, a2, b1, mask) == 0).all()
    upstream = draw(generator, 2, 3, 3, 3)
    *parts, grad_initial = gradients(
        lambda h, a, b, s: context_state(h, a, b, mask, s), upstream, hidden, a2, b1, initial
    )
    assert all((part == 0).all() for part in parts)
    torch.testing.assert_close(grad_initial, upstream.sum(1), rtol=1e-12, atol=1e-12)


def test_chunks_without_tokens(generator: Generator) -> None:
    a2, b1 = draw(generator, 3, 5), draw(generator, 5, 3)
    hidden, initial = torch.empty(2, 4, 0, 5, dtype=torch.float64), draw(generator, 2, 3, 3)
    upstream = draw(generator, 2, 4, 3, 3)
    assert (context_state(hidden, a2, b1) == 0).all()
    states = context_state(hidden, a2, b1, torch.empty(2, 4, 0, dtype=torch.bool), initial)
    assert torch.equal(states, initial[:, None].expand_as(states))
    grad_hidden, grad_a2, grad_b1 = gradients(context_state, upstream, hidden, a2, b1)
    assert grad_hidden.shape == hidden.shape
    assert (grad_a2 == 0).all()
    assert (grad_b1 == 0).all()


def test_continuing_from_a_state_equals_one_go(generator: Generator) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, (2, 9, 4, 6, 3))
    whole = context_state(hidden, a2, b1, mask, initial)
    first = context_state(hidden[:, :5], a2, b1, mask[:, :5], initial)
    second = context_state(hidden[:, 5:], a2, b1, mask[:, 5:], first[:, -1])
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)


def test_inputs_that_are_not_contiguous(generator: Generator) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, (2, 3, 4, 5, 3))
    wanted = context_state(hidden, a2, b1, mask, initial)
    strided = (
        hidden.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        a2.mT.contiguous().mT,
        torch.stack([b1, b1], -1)[..., 0],
        mask.mT.contiguous().mT,
        initial.mT.contiguous().mT,
    )
    assert not any(value.is_contiguous() for value in strided)
    torch.testing.assert_close(context_state(*strided), wanted, rtol=1e-12, atol=1e-12)
    upstream = draw(generator, 3, 2, 3, 3).transpose(0, 1)
    strided_gradients = torch.autograd.grad(
        context_state(*(leaf.requires_grad_() for leaf in strided[:3]), strided[3]), strided[:3], upstream
    )
    plain = gradients(lambda h, a, b: context_state(h, a, b, mask), upstream.contiguous(), hidden, a2, b1)
    for mine, wanted in zip(strided_gradients, plain, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_plain_pytorch(generator: Generator, dtype: torch.dtype) -> None:
    hidden, a2, b1, mask, initial = inputs(generator, (2, 3, 64, 48, 17))
    hidden, a2, b1 = hidden.to(dtype), a2.to(dtype) / 7, b1.to(dtype) / 7
    initial, upstream = initial.float(), draw(generator, 2, 3, 17, 17).float()
    exact_inputs = (hidden.double(), a2.double(), b1.double())
    exact = plain_states(*exact_inputs, mask, initial.double())
    states = context_state(hidden, a2, b1, mask, initial)
    assert states.dtype == torch.float32
    assert_as_good_as(states, reference.context_state(hidden, a2, b1, mask, initial), exact)

    mine = gradients(lambda *v: context_state(*v, mask), upstream, hidden, a2, b1)
    plain = gradients(lambda *v: reference.context_state(*v, mask), upstream, hidden, a2, b1)
    true = gradients(lambda *v: plain_states(*v, mask), upstream.double(), *exact_inputs)
    for a, b, c in zip(mine, plain, true, strict=True):
        assert a.dtype == dtype
        assert_as_good_as(a, b, c)


def test_long_contexts_accumulate_in_float32(generator: Generator) -> None:
    """With bfloat16 inputs the sum over 4096 chunks stays right: a bfloat16 sum would stall at 2^8 terms."""
    hidden = torch.ones(1, 4096, 1, 1, dtype=torch.bfloat16)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    assert torch.equal(context_state(hidden, one, one).flatten(), torch.arange(1.0, 4097.0))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return output


def test_chunks_times_chunks_is_never_formed(generator: Generator) -> None:
    chunks = 128
    hidden, a2, b1, mask, initial = inputs(generator, (1, chunks, 3, 4, 2))
    with Largest() as largest:
        states, projected = eager.forward(hidden, a2, b1, mask, initial)
        eager.backward(states, hidden, a2, b1, mask, projected, (True, True, True))
    assert 0 < largest.numel <= 2 * hidden.numel() < chunks * chunks

    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        context_state(hidden.requires_grad_(), a2.requires_grad_(), b1, mask, initial)
    assert 0 < sum(saved) <= hidden.numel() + projected.numel() + mask.numel() + a2.numel() + b1.numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(3, 4, 5)}, r"hidden must have shape \(B, T, M, d_h\)"),
        ({"hidden": torch.ones(2, 3, 4, 5, dtype=torch.int64)}, "hidden must be torch.float64 or .*torch.int64"),
        ({"hidden": torch.ones(2, 0, 4, 5)}, "hidden must have at least one chunk"),
        ({"a2": torch.ones(6, 4)}, r"a2 must have shape \(d_r, 5\)"),
        ({"b1": torch.ones(5, 7)}, r"b1 must have shape \(5, 6\)"),
        ({"b1": torch.ones(6, 5)}, r"b1 must have shape \(5, 6\)"),
        ({"a2": torch.ones(6, 5, dtype=torch.bfloat16)}, "a2 must be torch.float32 like hidden"),
        ({"b1": torch.ones(5, 6, device="meta")}, "b1 must be on cpu like hidden"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, r"mask must have shape \(2, 3, 4\)"),
        ({"mask": torch.ones(2, 3, 4)}, "mask must be torch.bool"),
        ({"initial_state": torch.ones(6, 6)}, r"initial_state must have shape \(2, 6, 6\)"),
        ({"initial_state": torch.ones(2, 6, 6, dtype=torch.float64)}, "initial_state must be torch.float32"),
    ],
)
def test_wrong_input_names_the_argument(change: dict[str, Tensor], message: str) -> None:
    arguments = {"hidden": torch.ones(2, 3, 4, 5), "a2": torch.ones(6, 5), "b1": torch.ones(5, 6)}
    context_state(**arguments)
    with pytest.raises(InputError, match=message):
        context_state(**{**arguments, **change})


def test_relative_error_sees_a_wrong_state(generator: Generator) -> None:
    """The measure of this file is not blind: leaving out one token is noticed."""
    hidden, a2, b1, mask, _ = inputs(generator, (1, 1, 64, 8, 4))
    mask[:] = True
    full = context_state(hidden, a2, b1, mask)
    mask[0, 0, 0] = False
    assert relative(context_state(hidden, a2, b1, mask), full) > 1e-6
