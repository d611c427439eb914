"""FrozenRMSNorm against the module of transformers: values, gradients, what is kept, and what it leaves alone."""

import copy

import pytest
import torch
from torch import Generator
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gakernels.nn import FrozenRMSNorm
from gakernels.nn.frozen_rms_norm import rms_norm

SIZE = 24


def make(generator: Generator, dtype: torch.dtype = torch.float32) -> LlamaRMSNorm:
    module = LlamaRMSNorm(SIZE, eps=1e-5)
    with torch.no_grad():
        module.weight.copy_(0.5 + torch.rand(SIZE, generator=generator))
    return module.to(dtype).requires_grad_(False)


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_good_as_the_module_of_transformers(generator: Generator, dtype: torch.dtype) -> None:
    theirs = make(generator, dtype)
    assert FrozenRMSNorm.can_stand_for(theirs)
    x, upstream = (torch.randn(3, 7, SIZE, generator=generator).to(dtype) for _ in range(2))
    leaf = x.double().requires_grad_()
    wanted = exact(leaf, theirs.weight, theirs.variance_epsilon)
    (wanted_gradient,) = torch.autograd.grad(wanted, leaf, upstream.double())
    errors = []
    for module in (FrozenRMSNorm(theirs), theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, upstream)
        assert y.dtype == gradient.dtype == dtype
        pairs = (y, wanted), (gradient, wanted_gradient)
        errors.append([((ours - true).norm() / true.norm()).item() for ours, true in pairs])
    for ours, plain in zip(*errors, strict=True):
        assert ours <= 2 * plain + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_weight(generator: Generator, dtype: torch.dtype) -> None:
    x, upstream = (torch.randn(3, 7, SIZE, generator=generator).to(dtype) for _ in range(2))
    kept = upstream.clone()
    results = []
    for function in (rms_norm, lambda x, weight, eps: torch.nn.functional.rms_norm(x, (SIZE,), weight, eps)):
        leaf = x.clone().requires_grad_()
        y = function(leaf, None, 1e-5)
        results.append((y, *torch.autograd.grad(y, leaf, upstream)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(upstream, kept)


def test_autocast_does_not_lower_the_precision_of_the_mean(generator: Generator) -> None:
    ours = FrozenRMSNorm(make(generator, torch.bfloat16))
    x = torch.randn(5, SIZE, generator=generator).bfloat16().requires_grad_()
    plain = ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), plain)


def test_without_a_gradient_the_module_of_transformers_computes(generator: Generator) -> None:
    theirs = make(generator)
    x = torch.randn(5, SIZE, generator=generator)
    assert torch.equal(FrozenRMSNorm(theirs)(x), theirs(x))
    with torch.no_grad():
        assert torch.equal(FrozenRMSNorm(theirs)(x.clone().requires_grad_()), theirs(x))


def test_another_dtype_is_left_to_the_module_of_transformers(generator: Generator) -> None:
    theirs = make(generator)
    ours = FrozenRMSNorm(theirs).double()
    x = torch.randn(5, SIZE, generator=generator, dtype=torch.float64).requires_grad_()
    assert theirs.weight.dtype == torch.float64
    assert torch.equal(ours(x), theirs(x))


def test_it_keeps_the_input_and_a_number_a_token(generator: Generator) -> None:
    ours, x = FrozenRMSNorm(make(generator)), torch.randn(5, SIZE, generator=generator).requires_grad_()
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(tensor.data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(x)
    sizes = sorted(tensor.numel() for tensor in kept.values())
    assert sizes == [5, SIZE, 5 * SIZE]


def test_others_are_left_alone(generator: Generator) -> None:
    gemma = GemmaRMSNorm(SIZE)
    with torch.no_grad():
        gemma.weight.normal_()
    assert not FrozenRMSNorm.can_stand_for(gemma)
    assert not FrozenRMSNorm.can_stand_for(torch.nn.LayerNorm(SIZE))
    assert not FrozenRMSNorm.can_stand_for(make(generator).to("meta"))
    assert not FrozenRMSNorm.can_stand_for(make(generator, torch.float64))


def test_a_copy_is_independent(generator: Generator) -> None:
    ours = FrozenRMSNorm(make(generator))
    x = torch.randn(2, SIZE, generator=generator)
    twin = copy.deepcopy(ours)
    before = twin(x)
    with torch.no_grad():
        ours.weight.zero_()
    assert torch.equal(twin(x), before)
