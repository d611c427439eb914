"""The chunked linear attention layer against its recurrent and its quadratic definition, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from examples.linear_attention import LinearAttention, chunked_attention, main

SIZE = 5


def draw(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def quadratic(queries: Tensor, keys: Tensor, values: Tensor, state: Tensor) -> Tensor:
    """y_i = S_0 q_i + sum over j <= i of (q_i . k_j) v_j, as one masked matrix of all pairs."""
    return (queries @ keys.mT).tril() @ values + queries @ state.mT


def recurrent(queries: Tensor, keys: Tensor, values: Tensor, state: Tensor) -> Tensor:
    """S_i = S_(i-1) + v_i k_i^T, y_i = S_i q_i, token by token."""
    outputs = []
    for q, k, v in zip(queries.unbind(1), keys.unbind(1), values.unbind(1), strict=True):
        state = state + v[:, :, None] * k[:, None, :]
        outputs.append((state @ q[:, :, None])[..., 0])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("definition", [quadratic, recurrent])
@pytest.mark.parametrize(("tokens", "chunk_size"), [(12, 4), (11, 4), (3, 8), (1, 1), (7, 1), (8, 8)])
@pytest.mark.parametrize("with_state", [False, True])
def test_output_and_gradients(
    generator: Generator, definition: object, tokens: int, chunk_size: int, with_state: bool
) -> None:
    inputs = [draw(generator, 3, tokens, SIZE).requires_grad_() for _ in range(3)]
    state = draw(generator, 3, SIZE, SIZE).requires_grad_(with_state)
    upstream = draw(generator, 3, tokens, SIZE)
    start = state if with_state else torch.zeros_like(state)
    y, after = chunked_attention(*inputs, chunk_size, state if with_state else None)
    wanted = definition(*inputs, start)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
    _, keys, values = inputs
    torch.testing.assert_close(after, start + values.mT @ keys, rtol=0, atol=1e-10)
    leaves = [*inputs, state] if with_state else inputs
    for found, expected in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_layer_and_its_parameters(generator: Generator) -> None:
    batch, tokens, heads, hidden_size = 2, 10, 3, 12
    layer = LinearAttention(hidden_size, heads, chunk_size=4).double()
    hidden = draw(generator, batch, tokens, hidden_size).requires_grad_()
    upstream, leaves = draw(generator, batch, tokens, hidden_size), [hidden, *layer.parameters()]
    q_weight, k_weight, v_weight = layer.qkv_proj.weight.chunk(3)
    rows = []
    for row in hidden:
        outputs = []
        for head in range(heads):
            part = slice(4 * head, 4 * head + 4)
            q, k, v = (row @ weight[part].T for weight in (q_weight, k_weight, v_weight))
            outputs.append(((F.elu(q) + 1) @ (F.elu(k) + 1).T).tril() @ v)
        rows.append(torch.cat(outputs, -1) @ layer.o_proj.weight.T)
    wanted = torch.stack(rows)
    y, _ = layer(hidden)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
    for found, expected in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_text_read_in_parts_is_the_text_read_at_once(generator: Generator) -> None:
    layer, hidden = LinearAttention(12, 3, chunk_size=4).double(), draw(generator, 2, 17, 12)
    wanted, last = layer(hidden)
    parts, state = [], None
    for part in hidden.split([6, 1, 10], 1):
        y, state = layer(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-10)


def test_bfloat16_is_as_good_as_the_quadratic_form_and_keeps_its_state_in_float32(generator: Generator) -> None:
    queries, keys, values = ((draw(generator, 3, 40, SIZE) / 2).bfloat16() for _ in range(3))
    y, state = chunked_attention(queries, keys, values, 8)
    nothing = torch.zeros(3, SIZE, SIZE, dtype=torch.bfloat16)
    exact = quadratic(queries.double(), keys.double(), values.double(), nothing.double())
    plain = quadratic(queries, keys, values, nothing)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert (y - exact).norm() <= 2 * (plain - exact).norm() + torch.finfo(y.dtype).eps * exact.norm()
    torch.testing.assert_close(state.double(), values.double().mT @ keys.double(), rtol=0, atol=1e-4)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    _, *differences = capsys.readouterr().out.splitlines()
    assert len(differences) == 2
    assert all(float(line.split(": ")[1]) < 1e-4 for line in differences)
