"""AdaptedOpaqueLinear over a layer that is no `nn.Linear`, against AdaptedLinear over the same map."""

import copy

import pytest
import torch
from torch import Generator, Tensor, nn
from transformers.pytorch_utils import Conv1D

from gakernels import AdaptedLinear, InputError, LowRankFactors
from gakernels.nn import CompactFactors
from gakernels.nn.adapted_opaque_linear import AdaptedOpaqueLinear, adapted, is_linear, is_plain_linear

WIDTH, OUT, RANK = 6, 5, 3


class Packed(nn.Module):
    """y = x W^T + b from a weight that is stored transposed, as bytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.moves = linear.in_features, linear.out_features, 0
        self.dtype = linear.weight.dtype
        packed = linear.weight.detach().t().contiguous().view(torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("state", torch.zeros(2))
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.view(self.dtype).to(x.dtype) + self.bias.to(x.dtype)

    def _apply(self, fn, recurse: bool = True) -> "Packed":
        self.moves += 1
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.note"] = torch.ones(())

    def _load_from_state_dict(self, state_dict, prefix: str, *rest) -> None:
        state_dict.pop(prefix + "weight.note")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def pair(generator: Generator, dtype: torch.dtype = torch.float64) -> tuple[AdaptedLinear, AdaptedOpaqueLinear]:
    linear = nn.Linear(WIDTH, OUT, dtype=dtype).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    wrapped = adapted(Packed(linear))
    assert isinstance(wrapped, AdaptedOpaqueLinear)
    return AdaptedLinear.from_linear(linear), wrapped


def random(generator: Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("index", [None, torch.tensor([2, -1, 0, 2])])
@pytest.mark.parametrize("shape", [(4, 3, WIDTH), (4, WIDTH), (4, 2, 3, WIDTH)])
def test_values_and_gradients(generator: Generator, index: Tensor | None, shape: tuple[int, ...]) -> None:
    adapters = 4 if index is None else 3
    factors = random(generator, adapters, RANK, WIDTH), random(generator, adapters, OUT, RANK)
    x, upstream = random(generator, *shape), random(generator, *shape[:-1], OUT)
    results = []
    for layer in pair(generator):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *factors)]
        layer.factors = LowRankFactors(leaves[1], leaves[2], 0.7, index)
        y = layer(leaves[0])
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_fewer_adapters_than_rows_and_rows_that_do_not_fit(generator: Generator) -> None:
    plain, ours = pair(generator)
    plain.factors = ours.factors = LowRankFactors(random(generator, 2, RANK, WIDTH), random(generator, 2, OUT, RANK), 2)
    x = random(generator, 6, 2, WIDTH)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-11, atol=1e-11)
    with pytest.raises(InputError, match="multiple of the 2 adapters"):
        ours(x[:5])


def test_compact_factors(generator: Generator) -> None:
    plain, ours = pair(generator)
    maps = random(generator, OUT, 4), random(generator, 4, WIDTH)
    sides = random(generator, 3, 4, 2), random(generator, 3, 4, 2)
    plain.factors = ours.factors = CompactFactors(*maps, *sides, 0.3)
    x = random(generator, 3, 2, WIDTH)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-11, atol=1e-11)


def test_without_factors_it_is_the_layer(generator: Generator) -> None:
    _, ours = pair(generator)
    x = random(generator, 3, WIDTH)
    assert torch.equal(ours(x), ours.original(x))
    assert ours.to_linear() is ours.original


def test_only_what_gradients_need_is_kept(generator: Generator) -> None:
    _, ours = pair(generator)
    lora_a, lora_b = random(generator, 1, RANK, WIDTH), random(generator, 1, OUT, RANK)
    x, kept = random(generator, 9, 1, WIDTH).requires_grad_(), []
    ours.factors = LowRankFactors(lora_a, lora_b, 1.0)
    sizes = {lora_a.numel(), lora_b.numel(), ours.weight.view(torch.float64).numel()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ours(x)
    assert set(kept) <= sizes  # frozen factors: neither x nor lora_A x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(generator: Generator, dtype: torch.dtype) -> None:
    """The error is that of the plain layer at the same dtype, within a factor of two."""
    plain, ours = pair(generator)
    exact = LowRankFactors(random(generator, 4, RANK, WIDTH), random(generator, 4, OUT, RANK), 0.5)
    plain.factors, x = exact, random(generator, 4, 50, WIDTH)
    wanted = plain(x)
    low = copy.deepcopy(plain).to(dtype)
    low.factors = ours.factors = LowRankFactors(exact.lora_a.to(dtype), exact.lora_b.to(dtype), 0.5)
    errors = [(layer(x.to(dtype)).double() - wanted).norm() for layer in (ours, low)]
    assert ours(x.to(dtype)).dtype == dtype
    assert errors[0] <= 2 * errors[1]


def test_autocast(generator: Generator) -> None:
    _, ours = pair(generator, torch.float32)
    ours.factors = LowRankFactors(*(random(generator, 1, *s, dtype=torch.float32) for s in ((2, WIDTH), (OUT, 2))), 1.0)
    x = random(generator, 3, 2, WIDTH, dtype=torch.float32).requires_grad_()
    wanted = ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == ours.original(x).dtype
    assert (y - wanted).norm() <= 0.05 * wanted.norm()
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32


def test_names_moves_and_state_dicts_stay_the_layers_own(generator: Generator) -> None:
    _, ours = pair(generator)
    names = {"weight", "weight.note", "state", "bias"}
    assert set(ours.state_dict()) == set(ours.original.state_dict()) == names
    assert [name for name, _ in ours.named_parameters()] == ["weight", "bias"]
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    _, other = pair(generator)
    x = random(generator, 3, WIDTH)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(x), ours(x))
    moved = copy.deepcopy(ours)
    assert moved.float() is moved
    assert moved.original.moves == 1
    assert moved.bias is moved.original.bias
    assert moved.bias.dtype == torch.float32
    ours.bias = nn.Parameter(torch.zeros(OUT, dtype=torch.float64))
    assert torch.equal(ours(x), x @ ours.weight.view(torch.float64))


class Other(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_what_counts_as_linear(generator: Generator) -> None:
    plain, packed = nn.Linear(WIDTH, OUT), pair(generator)[1].original
    holder = nn.Sequential(plain)
    holder.in_features, holder.out_features = WIDTH, OUT  # as PEFT's layers have them
    assert [is_linear(module) for module in (plain, packed, Other(2, 2), holder, nn.Bilinear(2, 2, 2), nn.ReLU())] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert [is_plain_linear(module) for module in (plain, packed, Other(2, 2))] == [True, False, False]
    plain.weight = nn.Parameter(plain.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert not is_plain_linear(plain)
    assert type(adapted(nn.Linear(2, 2))) is AdaptedLinear


def test_conv1d_is_a_linear_layer_with_its_weight_transposed(generator: Generator) -> None:
    conv = Conv1D(OUT, WIDTH).double().requires_grad_(False)
    conv.weight.copy_(random(generator, WIDTH, OUT))
    conv.bias.copy_(random(generator, OUT))
    linear = nn.Linear(WIDTH, OUT, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(conv.weight.T)
    linear.bias.copy_(conv.bias)
    x, delta = random(generator, 4, 3, WIDTH), random(generator, OUT, WIDTH)
    ours, plain = adapted(conv), AdaptedLinear.from_linear(linear)
    assert is_linear(conv)
    assert not is_plain_linear(conv)
    assert torch.equal(ours(x), conv(x))
    ours.factors = plain.factors = LowRankFactors(
        random(generator, 2, RANK, WIDTH), random(generator, 2, OUT, RANK), 0.7, torch.tensor([1, -1, 0, 1])
    )
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-11, atol=1e-11)
    assert ours.mergeable
    assert torch.equal(ours.merged_weight(delta), plain.merged_weight(delta).T)
    assert ours.to_linear() is conv


def test_compact_factors_read_a_flattened_batch(generator: Generator) -> None:
    plain, _ = pair(generator)
    left, right = random(generator, 4, 2, RANK), random(generator, 4, 2, RANK)
    plain.factors = CompactFactors(random(generator, OUT, 2), random(generator, 2, WIDTH), left, right, 0.7)
    x = random(generator, 4, 3, WIDTH)
    assert torch.equal(plain(x.flatten(0, 1)), plain(x).flatten(0, 1))
    with pytest.raises(InputError, match="must have 4 rows, one for each adapter, but it has 6"):
        plain(random(generator, 6, WIDTH))
