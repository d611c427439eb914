"""delta_state against its definition token by token, closed forms, and the bounds of its rounding."""

from collections.abc import Callable

import pytest
import torch
from oracles import assert_as_good_as, draw, gradients, orthogonal, relative
from torch import Generator, Tensor

from gakernels import InputError, context_state, delta_state
from gakernels.ops.delta_state import eager, reference

SHAPES = [  # B, T, M, d_h, d_r; blocks of the inverse have 32 tokens
    (1, 1, 1, 1, 1),
    (2, 3, 7, 5, 3),
    (3, 9, 1, 6, 5),
    (2, 2, 33, 6, 9),
    (1, 2, 70, 4, 7),
]


def inputs(generator: Generator, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """hidden, a2, b1, strength, a mask that keeps about two thirds and at least one, initial_state."""
    batch, chunks, tokens, hidden_size, state_size = shape
    mask = torch.rand(batch, chunks, tokens, generator=generator) < 2 / 3
    mask[:1, :1, :1] = True
    return (
        draw(generator, batch, chunks, tokens, hidden_size),
        draw(generator, state_size, hidden_size),
        draw(generator, hidden_size, state_size),
        torch.rand(batch, chunks, tokens, generator=generator, dtype=torch.float64),
        mask,
        draw(generator, batch, state_size, state_size),
    )


def plain(
    hidden: Tensor,
    a2: Tensor,
    b1: Tensor,
    strength: Tensor,
    mask: Tensor | None = None,
    initial: Tensor | None = None,
) -> Tensor:
    """S (I - b k k^T) + b v k^T for every token, row by row."""
    rows = []
    for r in range(hidden.shape[0]):
        state = hidden.new_zeros(len(a2), len(a2)) if initial is None else initial[r]
        chunks = []
        for t in range(hidden.shape[1]):
            for m in range(hidden.shape[2]):
                if mask is None or mask[r, t, m]:
                    key = b1.mT @ hidden[r, t, m]
                    key, b = key / key.norm(), strength[r, t, m]
                    erased = state @ (torch.eye(len(a2), dtype=state.dtype) - b * torch.outer(key, key))
                    state = erased + b * torch.outer(a2 @ hidden[r, t, m], key)
            chunks.append(state)
        rows.append(torch.stack(chunks))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("continued", [False, True])
def test_values_and_every_gradient_equal_both_definitions_in_float64(
    generator: Generator, shape: tuple[int, ...], masked: bool, continued: bool
) -> None:
    *variables, mask, initial = inputs(generator, shape)
    mask, variables = mask if masked else None, [*variables, *([initial] if continued else [])]

    def with_mask(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda hidden, a2, b1, strength, initial=None: function(hidden, a2, b1, strength, mask, initial)

    states = with_mask(delta_state)(*variables)
    upstream = draw(generator, *states.shape)
    ours = gradients(with_mask(delta_state), upstream, *variables)
    for definition in (plain, reference.delta_state):
        torch.testing.assert_close(states, with_mask(definition)(*variables), rtol=0, atol=1e-10)
        wanted = gradients(with_mask(definition), upstream, *variables)
        for mine, theirs in zip(ours, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_gradcheck(generator: Generator) -> None:
    *variables, mask, initial = inputs(generator, (2, 3, 4, 3, 2))
    mask[0, 0] = False
    leaves = [value.requires_grad_() for value in (*variables, initial)]
    assert torch.autograd.gradcheck(lambda h, a, b, s, i: delta_state(h, a, b, s, mask, i), leaves)


def test_a_key_gives_the_value_that_was_written_last(generator: Generator) -> None:
    """With full strength S k = v for orthogonal keys; a key that comes again replaces its value, in whole or part."""
    size = 12
    keys, identity = orthogonal(generator, size), torch.eye(2 * size, dtype=torch.float64)
    first, second = draw(generator, size, size), draw(generator, size, size)
    scales = 1 + torch.rand(2, size, 1, generator=generator, dtype=torch.float64)  # of the keys: only directions count
    values, written = torch.cat([first, second]), torch.cat([scales[0] * keys, scales[1] * keys])
    strength = torch.ones(1, 1, 2 * size, dtype=torch.float64)
    strength[0, 0, size + 2] = 0.25
    state = delta_state(identity[None, None], values.mT.contiguous(), written, strength)[0, 0]
    wanted = second.clone()
    wanted[2] = 0.75 * first[2] + 0.25 * second[2]
    torch.testing.assert_close(state @ keys.mT, wanted.mT, rtol=1e-12, atol=1e-12)


def test_weak_strengths_give_the_sum_with_unit_keys(generator: Generator) -> None:
    hidden, a2, b1, *_ = inputs(generator, (1, 3, 5, 6, 4))
    unit = hidden / (hidden @ b1).norm(dim=-1, keepdim=True).sqrt()
    tiny = torch.full(hidden.shape[:3], 1e-9, dtype=torch.float64)
    wanted = context_state(unit, a2, b1)
    torch.testing.assert_close(delta_state(hidden, a2, b1, tiny) / 1e-9, wanted, rtol=1e-6, atol=1e-6)


def test_chunks_do_not_matter(generator: Generator) -> None:
    *variables, mask, initial = inputs(generator, (2, 6, 7, 5, 4))
    hidden, a2, b1, strength = variables
    states = delta_state(*variables, mask, initial)
    whole = delta_state(hidden.flatten(1, 2)[:, None], a2, b1, strength.flatten(1)[:, None], mask.flatten(1)[:, None])
    alone = delta_state(*variables, mask)
    torch.testing.assert_close(alone[:, -1], whole[:, 0], rtol=1e-11, atol=1e-11)
    first = delta_state(hidden[:, :4], a2, b1, strength[:, :4], mask[:, :4], initial)
    second = delta_state(hidden[:, 4:], a2, b1, strength[:, 4:], mask[:, 4:], first[:, -1])
    torch.testing.assert_close(torch.cat([first, second], 1), states, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_masked_tokens_may_hold_anything(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, rubbish: float, backend: str
) -> None:
    monkeypatch.setenv("GAKERNELS_BACKEND", backend)
    hidden, a2, b1, strength, mask, initial = inputs(generator, (2, 4, 5, 6, 3))
    mask[0, 0] = False  # a fully masked first chunk
    mask[1, 2] = False
    upstream = draw(generator, 2, 4, 3, 3)

    def run(filling: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        filled = hidden.masked_fill(~mask[..., None], filling)
        weights = strength.masked_fill(~mask, filling)
        function = lambda h, a, b, s: delta_state(h, a, b, s, mask, initial)  # noqa: E731
        return function(filled, a2, b1, weights), gradients(function, upstream, filled, a2, b1, weights)

    states, grads = run(rubbish)
    clean_states, clean_grads = run(0.0)
    assert torch.equal(states, clean_states)
    assert torch.equal(states[0, 0], initial[0])
    assert torch.equal(states[1, 2], states[1, 1])
    assert (grads[0][~mask] == 0).all()
    assert (grads[3][~mask] == 0).all()
    for mine, clean in zip(grads, clean_grads, strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, clean)


def test_chunks_without_tokens(generator: Generator) -> None:
    *variables, _, initial = inputs(generator, (2, 4, 0, 5, 3))
    states = delta_state(*variables, initial_state=initial)
    assert torch.equal(states, initial[:, None].expand_as(states))
    grads = gradients(lambda *v: delta_state(*v[:4], None, v[4]), torch.ones_like(states), *variables, initial)
    assert all((grad == 0).all() for grad in grads[:4])
    assert (grads[4] == 4).all()


def test_a_token_whose_key_is_zero_writes_nothing(generator: Generator) -> None:
    hidden, a2, b1, strength, *_ = inputs(generator, (1, 2, 3, 5, 3))
    hidden[0, 1] = 0
    states = delta_state(hidden, a2, b1, strength)
    assert torch.equal(states[0, 1], states[0, 0])
    grads = gradients(delta_state, draw(generator, *states.shape), hidden, a2, b1, strength)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("kind", ["random", "alike", "opposite"])
def test_the_inverse_is_bounded_and_right(generator: Generator, kind: str) -> None:
    """Also for keys in a few directions, where (I + A) is far from orthogonal."""
    keys = draw(generator, 200, 300 if kind == "random" else 3)
    if kind != "random":
        keys = keys[:1] + 1e-3 * keys
    if kind == "opposite":
        keys = keys * (-1) ** torch.arange(200)[:, None]
    keys = (keys / keys.norm(dim=-1, keepdim=True)).float()
    strength = torch.rand(200, 1, generator=generator)
    lower = strength * (keys @ keys.mT)
    found = eager.unit_lower_inverse(lower)
    exact = torch.linalg.inv(torch.eye(200, dtype=torch.float64) + lower.double().tril(-1))
    assert exact.abs().max() <= 1 + 1e-6
    assert torch.equal(found, found.tril())
    plain = torch.linalg.solve_triangular(lower.tril(-1) + torch.eye(200), torch.eye(200), upper=False)
    assert_as_good_as(found, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_plain_pytorch(generator: Generator, dtype: torch.dtype) -> None:
    hidden, a2, b1, strength, mask, initial = inputs(generator, (2, 3, 64, 48, 17))
    hidden, a2, b1 = hidden.to(dtype), a2.to(dtype) / 7, b1.to(dtype) / 7
    strength, initial, upstream = strength.float(), initial.float(), draw(generator, 2, 3, 17, 17).float()
    variables = (hidden, a2, b1, strength)
    exact_variables = tuple(value.double() for value in variables)
    exact = plain(*exact_variables, mask, initial.double())
    states = delta_state(*variables, mask, initial)
    assert states.dtype == torch.float32
    assert_as_good_as(states, reference.delta_state(*variables, mask, initial), exact)

    mine = gradients(lambda *v: delta_state(*v, mask), upstream, *variables)
    theirs = gradients(lambda *v: reference.delta_state(*v, mask), upstream, *variables)
    true = gradients(lambda *v: plain(*v, mask), upstream.double(), *exact_variables)
    for a, b, c in zip(mine, theirs, true, strict=True):
        assert a.dtype == b.dtype
        assert_as_good_as(a, b, c)


def test_long_contexts_stay_right_in_float32(generator: Generator) -> None:
    """4,096 tokens of which the state remembers the latest: errors fade as they do."""
    hidden, a2, b1, strength, *_ = inputs(generator, (1, 16, 256, 24, 16))
    narrow = [value.float() for value in (hidden, a2, b1, strength)]
    exact = plain(*(value.double() for value in narrow))
    assert relative(delta_state(*narrow), exact) < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(3, 4, 5)}, r"hidden must have shape \(B, T, M, d_h\)"),
        ({"b1": torch.ones(5, 7)}, r"b1 must have shape \(5, 6\)"),
        ({"strength": torch.ones(2, 3)}, r"strength must have shape \(2, 3, 4\), but it has \(2, 3\)"),
        ({"strength": torch.ones(2, 3, 4).bfloat16()}, "strength must be torch.float32, but it is torch.bfloat16"),
        ({"mask": torch.ones(2, 3, 4)}, "mask must be torch.bool"),
        ({"initial_state": torch.ones(6, 6)}, r"initial_state must have shape \(2, 6, 6\)"),
    ],
)
def test_wrong_input_names_the_argument(change: dict[str, Tensor], message: str) -> None:
    arguments = {"hidden": torch.ones(2, 3, 4, 5), "a2": torch.ones(6, 5), "b1": torch.ones(5, 6)}
    arguments["strength"] = torch.ones(2, 3, 4)
    delta_state(**arguments)
    with pytest.raises(InputError, match=message):
        delta_state(**{**arguments, **change})
