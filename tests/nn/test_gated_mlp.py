"""GatedMLP computes what the modules of transformers do, and keeps less."""

import copy
import weakref

import pytest
import torch
from tiny import make_model
from torch import Generator, nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from gakernels.model.attachment import put_in_lean_modules, take_out_lean_modules
from gakernels.nn import AdaptedLinear, GatedMLP, LowRankFactors


def make(generator: Generator, dtype: torch.dtype, bias: bool = False) -> LlamaMLP:
    module = LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2, mlp_bias=bias)).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_module(generator: Generator, dtype: torch.dtype, bias: bool) -> None:
    """The same bits; without a bias the gradient has a rounding less."""
    theirs = make(generator, dtype, bias)
    assert GatedMLP.can_stand_for(theirs)
    ours = GatedMLP(theirs)
    x, upstream = (torch.randn(2, 7, 12, generator=generator).to(dtype) for _ in range(2))
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y, torch.autograd.grad(y, leaf, upstream)[0]))
    (y, gradient), (wanted, wanted_gradient) = results
    assert torch.equal(y, wanted)
    if bias:
        assert torch.equal(gradient, wanted_gradient)
    else:
        leaf = x.double().requires_grad_()
        exact = torch.autograd.grad(copy.deepcopy(theirs).double()(leaf), leaf, upstream.double())[0]
        error, usual = ((found - exact).norm() for found in (gradient, wanted_gradient))
        assert error <= 2 * usual + torch.finfo(dtype).eps * exact.norm()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_gradcheck(generator: Generator) -> None:
    ours = GatedMLP(make(generator, torch.float64))
    x = torch.randn(3, 12, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ours, x)


def test_it_keeps_two_tensors_between_the_linear_layers(generator: Generator) -> None:
    theirs = make(generator, torch.float32)
    x = torch.randn(5, 12, generator=generator).requires_grad_()
    weights = {parameter.data_ptr() for parameter in theirs.parameters()}

    def kept(module: nn.Module) -> int:
        """Bytes of the tensors that the graph keeps, the weights apart."""
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.setdefault(t.data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
        ):
            module(x)
        return sum(size for place, size in found.items() if place not in weights)

    assert kept(GatedMLP(theirs)) == 2 * 5 * 20 * 4
    assert kept(theirs) > kept(GatedMLP(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_values_and_gradients_are_the_same_bits(generator: Generator, dtype: torch.dtype) -> None:
    ours = GatedMLP(make(generator, dtype))
    x, upstream = (torch.randn(2, 7, 12, generator=generator).to(dtype) for _ in range(2))
    results = []
    for ours.recompute in (False, True):
        leaf = x.clone().requires_grad_()
        y = ours(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, upstream)))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_keeps_neither_gate_nor_up(generator: Generator, recompute: bool) -> None:
    ours = GatedMLP(make(generator, torch.float32))
    ours.recompute = recompute
    made: list[weakref.ref[torch.Tensor]] = []
    for linear in (ours.gate_proj, ours.up_proj):
        linear.register_forward_hook(lambda _, __, output: made.append(weakref.ref(output)))
    y = ours(torch.randn(5, 12, generator=generator).requires_grad_())
    assert y.requires_grad
    assert len(made) == 2
    assert [ref() is None for ref in made] == [recompute] * 2


def test_the_factors_of_the_forward_are_recomputed_with(generator: Generator) -> None:
    """In the backward of a step the layers carry other factors, or none, again."""
    ours = GatedMLP(make(generator, torch.float64))
    ours.gate_proj = gate = AdaptedLinear.from_linear(ours.gate_proj)
    x = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
    lora_a, lora_b = (torch.randn(2, *size, generator=generator, dtype=torch.float64) for size in ((4, 12), (20, 4)))
    results = []
    for ours.recompute in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_a, lora_b)]
        gate.factors = LowRankFactors(leaves[1], leaves[2], 0.5)
        y = ours(leaves[0])
        gate.factors = None
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_another_activation_or_other_parts_are_left_alone(generator: Generator) -> None:
    gemma = GemmaMLP(
        GemmaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2, hidden_activation="gelu_pytorch_tanh")
    )
    assert not GatedMLP.can_stand_for(gemma)
    assert not GatedMLP.can_stand_for(nn.Linear(3, 3))
    more = make(generator, torch.float32)
    more.extra = nn.Linear(12, 12)
    assert not GatedMLP.can_stand_for(more)
    assert not GatedMLP.can_stand_for(make(generator, torch.float32).to("meta"))

    class Halved(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    halved = make(generator, torch.float32)
    halved.__class__ = Halved
    assert not GatedMLP.can_stand_for(halved)


def test_the_original_comes_back_with_the_layers_that_are_there(generator: Generator) -> None:
    theirs = make(generator, torch.float32)
    ours = GatedMLP(theirs)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    ours.down_proj = nn.Linear(20, 12)
    assert ours.original is theirs
    assert theirs.down_proj is ours.down_proj


def test_a_copy_is_independent(generator: Generator) -> None:
    ours = GatedMLP(make(generator, torch.float32))
    x = torch.randn(2, 12, generator=generator)
    twin = copy.deepcopy(ours)
    before = twin(x)
    with torch.no_grad():
        ours.gate_proj.weight.zero_()
    assert torch.equal(twin(x), before)
    assert torch.equal(twin.original(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_can_be_put_in_again_beside_adapted_layers(dtype: torch.dtype) -> None:
    model = make_model(base_dtype=dtype, linears=("gate_proj",))
    kinds = [type(module) for module in model.base.modules()]
    take_out_lean_modules(model.base)
    assert GatedMLP not in [type(module) for module in model.base.modules()]
    put_in_lean_modules(model.base)
    assert [type(module) for module in model.base.modules()] == kinds
