"""Float8Linear against its definition in float64."""

import copy

import pytest
import torch
from emulation import EmulatedProduct
from torch import Generator, Tensor, nn

from gakernels import BackendError, InputError
from gakernels.nn import float8_linear as module
from gakernels.nn.float8_linear import Float8Linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(generator: Generator, inputs: int = 48, outputs: int = 32, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    linear.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
    linear.weight.mul_(torch.exp(torch.randn(outputs, 1, generator=generator)))
    return linear


def close(ours: Tensor, wanted: Tensor) -> None:
    """To the rounding of a float32 sum, and of the result to its own type."""
    eps = max(torch.finfo(ours.dtype).eps, 16 * torch.finfo(torch.float32).eps)
    assert (ours.double() - wanted.double()).norm() <= eps * wanted.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(48, 32), (172, 20), (1, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient(generator: Generator, dtype: torch.dtype, sizes: tuple[int, int], bias: bool) -> None:
    plain = make(generator, *sizes, bias).to(dtype)
    ours = Float8Linear(plain)
    x = torch.randn(2, 5, sizes[0], generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(2, 5, sizes[1], generator=generator).to(dtype)
    y = ours(x)
    wide = x.detach().double().requires_grad_()
    wanted = EmulatedProduct.apply(wide, plain.weight) + (0 if plain.bias is None else plain.bias.double())
    assert y.dtype == dtype
    close(y, wanted)
    close(torch.autograd.grad(y, x, upstream)[0], torch.autograd.grad(wanted, wide, upstream.double())[0])
    with torch.no_grad():
        assert torch.equal(ours(x), y)


def test_it_is_near_the_plain_layer(generator: Generator) -> None:
    """Two numbers of 3 bits of mantissa in every product: each is off by at most 1/16, by about 1/40 on average."""
    plain = make(generator, 512, 256)
    x = torch.randn(64, 512, generator=generator)
    error = (Float8Linear(plain)(x) - plain(x)).norm() / plain(x).norm()
    assert 0.01 < error < 0.06


def test_nothing_but_weights_is_kept(generator: Generator) -> None:
    ours, kept = Float8Linear(make(generator)), []
    x = torch.randn(9, 48, generator=generator).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x)
    weights = {ours.weight_scale.data_ptr(), ours.transposed().data_ptr()}
    assert {tensor.data_ptr() for tensor in kept} == weights


def test_the_second_layout_is_made_for_gradients_only(generator: Generator) -> None:
    ours = Float8Linear(make(generator))
    ours(torch.randn(3, 48, generator=generator))
    assert ours._transposed is None
    ours(torch.randn(3, 48, generator=generator).requires_grad_())
    assert torch.equal(ours._transposed.view(torch.uint8), ours.weight.mT.contiguous().view(torch.uint8))


def test_what_several_layers_read_is_quantised_once(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Float8Linear(make(generator)) for _ in range(3)]
    calls = []
    from gakernels.nn import float8

    plain = float8.quantize_rows
    monkeypatch.setattr(float8, "quantize_rows", lambda *arguments: calls.append(1) or plain(*arguments))
    x = torch.randn(2, 5, 48, generator=generator)
    for layer in layers:
        layer(x)
    assert len(calls) == 1


def test_moves_casts_and_state_dicts(generator: Generator) -> None:
    plain = make(generator, bias=True)
    ours, other = Float8Linear(plain), Float8Linear(make(generator, bias=True))
    x = torch.randn(3, 48, generator=generator)
    leaf = x.clone().requires_grad_()
    y = ours(leaf)
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    for changed in (copy.deepcopy(ours), copy.deepcopy(ours).to(torch.bfloat16), copy.deepcopy(ours).half().float()):
        assert torch.equal(changed(x), y)
        assert changed.weight.dtype == torch.float8_e4m3fn
    other(leaf)  # with a second layout of its old weight
    other.load_state_dict(ours.state_dict())
    assert set(ours.state_dict()) == {"weight", "weight_scale", "bias"}
    assert torch.equal(other(leaf), y)
    assert torch.equal(torch.autograd.grad(other(leaf).sum(), leaf)[0], gradient)


def test_no_rows(generator: Generator) -> None:
    ours = Float8Linear(make(generator))
    x = torch.zeros(0, 4, 48, requires_grad=True)
    y = ours(x)
    assert y.shape == (0, 4, 32)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_autocast_gives_its_dtype(generator: Generator) -> None:
    ours = Float8Linear(make(generator))
    x = torch.randn(3, 48, generator=generator).requires_grad_()
    upstream = torch.randn(3, 32, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ours(x).bfloat16())
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(gradient, torch.autograd.grad(ours(x), x, upstream.float())[0])


def test_compiled_without_a_break(generator: Generator) -> None:
    ours = Float8Linear(make(generator))
    x = torch.randn(3, 48, generator=generator).requires_grad_()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = []
    for run in (ours, compiled):
        y = run(x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_what_can_not_run_is_refused(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="GPU or a CPU, but the base model is on meta"):
        Float8Linear(make(generator).to("meta"))
    with pytest.raises(InputError, match="float64"):
        Float8Linear(make(generator).double())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(BackendError, match=r"compute capability 8\.9 or more, but this one has 8\.0"):
        module.check_device(torch.device("cuda"))
