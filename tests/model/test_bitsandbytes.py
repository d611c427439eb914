"""int8 and nf4 by bitsandbytes, where it is installed: it rounds and multiplies, adapters and gradients are ours."""

import copy

import pytest
import torch
import transformers
from tiny import SIZES, logits_of, make_config, make_trained, random_context, random_ids
from torch import Tensor
from transformers import PreTrainedModel

from gakernels import AdaptedLinear, GenerativeAdapter, LowRankFactors
from gakernels.model.quantized_base import quantize_base
from gakernels.nn.adapted_opaque_linear import AdaptedOpaqueLinear, adapted
from gakernels.nn.bitsandbytes_linear import int8_linear, nf4_linear

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["int8", "nf4"]


def make_base() -> PreTrainedModel:
    """Sizes in multiples of its blocks of 64 weights."""
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.1)).eval()


def effective_weight(linear: torch.nn.Module) -> Tensor:
    """What the layer multiplies with: its images of the unit vectors, one at a time (int8 rounds each row alone)."""
    return linear(torch.eye(linear.in_features)).detach().mT


def test_a_model_in_4_bits_is_the_one_with_those_weights() -> None:
    base = make_base()
    quantised = quantize_base(copy.deepcopy(base), "nf4")
    for name, module in quantised.named_modules():  # the same weights, in full
        if hasattr(module, "in_features") and name != "lm_head":
            base.get_submodule(name).weight.data.copy_(effective_weight(module))
    model = make_trained(GenerativeAdapter(quantised, make_config()))
    plain = GenerativeAdapter(base, make_config())
    plain.load_generator_tensors(model.generator_tensors(), "model")
    assert isinstance(quantised.model.layers[0].self_attn.o_proj, AdaptedOpaqueLinear)
    ids = random_ids(2, 3, 6)
    results = []
    for one in (model, plain):
        hidden, _ = one(ids, torch.ones_like(ids, dtype=torch.bool), 2, (0, 1, 2))
        loss = one.token_loss(hidden[..., :-1, :].flatten(0, 2), ids[..., 1:].flatten()).mean()
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in one.generators.parameters()]
        results.append((loss.detach(), torch.cat(gradients)))
    for ours, wanted in zip(*results, strict=True):
        assert (ours - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_through_after_a_pass_without_them(kind: str) -> None:
    """int8 rounds its inputs to 8 bits too, a row at a time."""
    plain = make_base().model.layers[0].mlp.up_proj.requires_grad_(False)
    quantised = {"int8": int8_linear, "nf4": nf4_linear}[kind](plain)
    layer, full = adapted(quantised), AdaptedLinear.from_linear(plain)
    full.weight = torch.nn.Parameter(effective_weight(quantised), requires_grad=False)
    factors = torch.randn(1, 3, 64), torch.randn(1, 128, 3)
    x, upstream = torch.randn(4, 5, 64), torch.randn(4, 5, 128)
    with torch.no_grad():
        layer(x)
    results = []
    for one in (layer, full):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *factors)]
        one.factors = LowRankFactors(leaves[1], leaves[2], 0.2)
        y = one(leaves[0])
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for ours, wanted in zip(*results, strict=True):
        assert (ours - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_as_a_whole(kind: str, tmp_path) -> None:
    base = make_base()
    ids, context = random_ids(2, 12), random_context(15)
    logits = logits_of(base, ids)
    model = make_trained(GenerativeAdapter(quantize_base(copy.deepcopy(base), kind), make_config()))
    quantised = logits_of(model.base, ids)
    assert (quantised - logits).norm() < {"int8": 0.05, "nf4": 0.4}[kind] * logits.norm()
    adapter = model.adapters(model.states([context]), [15])[0]
    with model.adapted(adapter):
        assert not torch.allclose(logits_of(model.base, ids), quantised)
    model.save_pretrained(tmp_path)
    again = GenerativeAdapter.from_pretrained(tmp_path, base)  # the same base in full
    assert again.base_fingerprint() == model.base_fingerprint()
    torch.testing.assert_close(logits_of(model.detach(), ids), quantised)
