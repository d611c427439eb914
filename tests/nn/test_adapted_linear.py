"""AdaptedLinear: a linear layer to everything around it, with an adapter per row of the batch."""

import copy

import pytest
import torch
from torch import Generator, Tensor, nn

from gakernels import AdaptedLinear, AdapterGenerator, InputError, LowRankFactors


def draw(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def linear(generator: Generator, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(5, 7, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draw(generator, *parameter.shape))
    return layer


def factors(generator: Generator, adapters: int, index: Tensor | None = None) -> LowRankFactors:
    return LowRankFactors(draw(generator, adapters, 2, 5), draw(generator, adapters, 7, 2), 0.3, index)


def merged(layer: nn.Linear, given: LowRankFactors, i: int) -> nn.Linear:
    """The plain layer with adapter i folded into its weight."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight += given.scale * given.lora_b[i] @ given.lora_a[i]
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_without_factors_it_is_exactly_the_base(generator: Generator, bias: bool) -> None:
    base = linear(generator, bias)
    adapted = AdaptedLinear.from_linear(base)
    for shape in ((5,), (3, 5), (2, 3, 5), (2, 3, 4, 5), (0, 5)):
        x = draw(generator, *shape)
        assert torch.equal(adapted(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_zero_adapter_is_exactly_the_base(generator: Generator, dtype: torch.dtype) -> None:
    """What a fresh generator gives changes no bit of the layer."""
    base = linear(generator).to(dtype)
    adapted = AdaptedLinear.from_linear(base)
    make = AdapterGenerator(6, 5, 7, state_size=4, rank=2)
    lora_a, lora_b, _ = make(draw(generator, 1, 3, 8, 6).float())
    adapted.factors = LowRankFactors(lora_a[0], lora_b[0], 0.5)
    x = draw(generator, 3, 4, 5).to(dtype)
    assert torch.equal(adapted(x), base(x))


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 2, 3, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_one_adapter_serves_every_row(generator: Generator, shape: tuple[int, ...], bias: bool) -> None:
    base, given, x = linear(generator, bias), factors(generator, 1), draw(generator, *shape)
    adapted = AdaptedLinear.from_linear(base)
    adapted.factors = given
    y = adapted(x)
    torch.testing.assert_close(y, merged(base, given, 0)(x), rtol=0, atol=1e-12)
    assert (y - base(x)).norm() > 0.01


def test_several_adapters_serve_equal_groups_of_rows(generator: Generator) -> None:
    base, given, x = linear(generator), factors(generator, 2), draw(generator, 6, 3, 5)
    adapted = AdaptedLinear.from_linear(base)
    adapted.factors = given
    wanted = torch.cat([merged(base, given, 0)(x[:3]), merged(base, given, 1)(x[3:])])
    torch.testing.assert_close(adapted(x), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_with_an_index(generator: Generator, dtype: torch.dtype) -> None:
    base, x = linear(generator), draw(generator, 4, 3, 5)
    given = factors(generator, 3, torch.tensor([2, -1, 0, 2], dtype=dtype))
    adapted = AdaptedLinear.from_linear(base)
    adapted.factors = given
    wanted = torch.stack([(merged(base, given, i) if i >= 0 else base)(row) for i, row in zip((2, -1, 0, 2), x)])  # noqa: B905
    torch.testing.assert_close(adapted(x), wanted, rtol=0, atol=1e-12)


def test_drop_in_in_a_plain_sequential(generator: Generator) -> None:
    """The module replaces a layer of a model that knows nothing of it, trains its factors, and leaves again."""
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), linear(generator).float(), nn.Tanh())
    plain, x = copy.deepcopy(network), draw(generator, 6, 4).float()
    network[2] = AdaptedLinear.from_linear(network[2])
    assert torch.equal(network(x), plain(x))
    assert list(network.state_dict()) == list(plain.state_dict())

    lora_a, lora_b = (draw(generator, *shape).float().requires_grad_() for shape in ((1, 2, 5), (1, 7, 2)))
    network[2].factors = LowRankFactors(lora_a, lora_b, 1.0)
    network(x).square().sum().backward()
    assert lora_a.grad.norm() > 0
    assert lora_b.grad.norm() > 0
    assert network[0].weight.grad.norm() > 0  # the gradient passes through to what is in front
    assert network[2].weight.grad is None

    network[2] = network[2].to_linear()
    assert type(network[2]) is nn.Linear
    assert torch.equal(network(x), plain(x))


@pytest.mark.parametrize("bias", [False, True])
def test_it_looks_like_a_linear_layer(generator: Generator, bias: bool) -> None:
    base = linear(generator, bias)
    names = [name for name, _ in base.named_parameters()]
    adapted = AdaptedLinear.from_linear(base)
    assert isinstance(adapted, nn.Linear)
    assert [name for name, _ in adapted.named_parameters()] == names
    assert adapted.weight is base.weight
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    adapted.factors = factors(generator, 1)
    assert list(adapted.state_dict()) == names  # factors are no part of the model
    assert adapted.training == base.training
    assert not AdaptedLinear.from_linear(base.eval()).training


def test_state_dict_round_trip(generator: Generator) -> None:
    base, other = linear(generator), linear(generator)
    adapted = AdaptedLinear.from_linear(copy.deepcopy(other))
    adapted.load_state_dict(base.state_dict())
    x = draw(generator, 3, 5)
    assert torch.equal(adapted(x), base(x))
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other(x), base(x))


def test_factors_take_the_dtype_of_the_input(generator: Generator) -> None:
    adapted = AdaptedLinear.from_linear(linear(generator).bfloat16())
    adapted.factors = factors(generator, 1)  # float64
    assert adapted(draw(generator, 2, 3, 5).bfloat16()).dtype == torch.bfloat16


def test_autocast(generator: Generator) -> None:
    adapted = AdaptedLinear.from_linear(linear(generator).float())
    given = factors(generator, 1)
    adapted.factors = LowRankFactors(given.lora_a.float(), given.lora_b.float(), 0.3)
    x = draw(generator, 2, 3, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, adapted.bfloat16()(x.bfloat16()))


def test_rows_that_can_not_be_shared_out_are_refused(generator: Generator) -> None:
    adapted = AdaptedLinear.from_linear(linear(generator))
    adapted.factors = factors(generator, 2)
    with pytest.raises(InputError, match="multiple of the 2 adapters, but there are 3"):
        adapted(draw(generator, 3, 4, 5))
    adapted.factors = factors(generator, 2, torch.tensor([0, 1]))
    with pytest.raises(InputError, match="must have 2 rows, one for each adapter, but it has 3"):
        adapted(draw(generator, 3, 4, 5))
    with pytest.raises(InputError, match="must have 2 rows, one for each adapter, but it has 5"):
        adapted(draw(generator, 5, 5))


@pytest.mark.parametrize("index", [None, torch.tensor([1, -1, 0, 1])])
def test_a_flattened_batch_is_read_as_its_rows(generator: Generator, index: Tensor | None) -> None:
    adapted, x = AdaptedLinear.from_linear(linear(generator)), draw(generator, 4, 3, 5)
    adapted.factors = factors(generator, 2, index)
    assert torch.equal(adapted(x.flatten(0, 1)), adapted(x).flatten(0, 1))
