"""Whole models on a quantised base."""

import copy
import sys

import pytest
import torch
from emulation import EmulatedLinear
from tiny import FAMILIES, logits_of, make_base, make_config, make_trained, random_context, random_ids
from torch import Tensor, nn
from transformers import PreTrainedModel

from gakernels import BackendError, GenerativeAdapter, InputError
from gakernels.files import read_tensors
from gakernels.model.quantized_base import quantize_base
from gakernels.nn import FrozenRMSNorm, GatedMLP
from gakernels.nn.adapted_opaque_linear import AdaptedOpaqueLinear, is_plain_linear
from gakernels.nn.float8_linear import Float8Linear


def emulate(base: PreTrainedModel) -> PreTrainedModel:
    """Every linear layer of the decoder layers computes by the definition."""
    for layer in base.model.layers:
        for parent in layer.modules():
            for name, part in parent.named_children():
                if is_plain_linear(part):
                    setattr(parent, name, EmulatedLinear(part))
    return base


def losses_and_gradients(model: GenerativeAdapter, ids: Tensor) -> tuple[float, Tensor]:
    mask = torch.ones_like(ids, dtype=torch.bool)
    hidden, _ = model(ids, mask, 2, (0, 1, 2))
    loss = model.token_loss(hidden[..., :-1, :].flatten(0, 2), ids[..., 1:].flatten()).mean()
    loss.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.generators.parameters()])
    return loss.item(), gradients


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen3", "phi3"])
def test_values_and_gradients_of_a_model_in_fp8(family: str) -> None:
    """A rounding error may put a number on the other side of a tie, so a few numbers may differ more than by it."""
    base, config = make_base(family), make_config(family)
    ids = random_ids(2, 3, 6)
    ours = make_trained(GenerativeAdapter(quantize_base(copy.deepcopy(base), "fp8"), config))
    theirs = GenerativeAdapter(emulate(copy.deepcopy(base)), config)
    plain = GenerativeAdapter(base, config)
    for model in (theirs, plain):
        model.load_generator_tensors(ours.generator_tensors(), "ours")
    loss, gradient = losses_and_gradients(ours, ids)
    wanted, wanted_gradient = losses_and_gradients(theirs, ids)
    full, full_gradient = losses_and_gradients(plain, ids)
    off = (full_gradient - wanted_gradient).norm()  # what 8 bits change
    assert abs(loss - wanted) <= 0.2 * abs(full - wanted) + 0.01
    assert (gradient - wanted_gradient).norm() <= 0.5 * off


def test_all_linear_layers_of_the_decoder_layers_and_no_others() -> None:
    base = quantize_base(make_base("llama_bias"), "fp8")
    kinds = {name: type(module) for name, module in base.named_modules() if hasattr(module, "in_features")}
    assert kinds.pop("lm_head") is nn.Linear
    assert len(kinds) == 3 * 7
    assert set(kinds.values()) == {Float8Linear}
    assert base.dtype == torch.float32
    model = GenerativeAdapter(base, make_config("llama_bias"))
    layer = base.model.layers[0]
    assert isinstance(layer.mlp, GatedMLP)
    assert isinstance(layer.input_layernorm, FrozenRMSNorm)
    assert isinstance(layer.self_attn.o_proj, AdaptedOpaqueLinear)
    assert not any(parameter.requires_grad for parameter in model.base.parameters())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
def test_detaching_gives_the_quantised_model_back(family: str) -> None:
    base = quantize_base(make_base(family, torch.bfloat16), "fp8")
    ids = random_ids(2, 12)
    logits, names = logits_of(base, ids), list(base.state_dict())
    model = make_trained(GenerativeAdapter(base, make_config(family)))
    adapter = model.adapters(model.states([random_context(14)]), [14])[0]
    with model.adapted(adapter):
        assert not torch.equal(logits_of(model.base, ids), logits)
    assert list(model.base.state_dict()) == names
    assert torch.equal(logits_of(model.detach(), ids), logits)


def test_generators_and_adapters_fit_the_base_in_any_precision(tmp_path) -> None:
    base = make_base()
    in_8_bits = quantize_base(copy.deepcopy(base), "fp8")
    model = make_trained(GenerativeAdapter(in_8_bits, make_config()))
    context, ids = random_context(20), random_ids(1, 12)
    model.save_pretrained(tmp_path)
    in_full = GenerativeAdapter.from_pretrained(tmp_path, base)
    adapter = model.adapters(model.states([context]), [20])[0]
    with in_full.adapted(adapter):
        wanted = logits_of(in_full.base, ids)
    in_full.detach()
    again = GenerativeAdapter.from_pretrained(tmp_path, quantize_base(copy.deepcopy(base), "fp8"))
    for name, tensor in model.generator_tensors().items():
        assert torch.equal(again.generator_tensors()[name], tensor)
    assert (
        again.base_fingerprint() == read_tensors(tmp_path / "generator.safetensors", "generator")[1]["base_fingerprint"]
    )
    with again.adapted(adapter):
        found = logits_of(again.base, ids)
    assert (found - wanted).norm() < 0.5 * wanted.norm()


def test_recomputing_gives_the_same_bits() -> None:
    model = make_trained(GenerativeAdapter(quantize_base(make_base(), "fp8"), make_config()))
    ids, results = random_ids(2, 3, 6), []
    for recompute in (False, True):
        for layer in model.base.model.layers:
            layer.mlp.recompute = recompute
        results.append(losses_and_gradients(model, ids))
        model.zero_grad()
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_merging_is_refused() -> None:
    model = make_trained(GenerativeAdapter(quantize_base(make_base(), "fp8"), make_config()))
    adapter = model.adapters(model.states([random_context(7)]), [7])[0]
    with pytest.raises(InputError, match="weights that are quantised"):
        model.merge(adapter)


def test_a_row_does_not_depend_on_the_others() -> None:
    model = make_trained(GenerativeAdapter(quantize_base(make_base(), "fp8"), make_config()))
    adapters = model.adapters(model.states([random_context(8), random_context(9)]), [8, 9])
    ids = random_ids(2, 10)
    with model.adapted(adapters):
        both = logits_of(model.base, ids)
    for row, adapter in enumerate(adapters):
        with model.adapted(adapter):
            alone = logits_of(model.base, ids[row : row + 1])
        # Sums in another order: a number may fall to the other side of a tie.
        assert (alone[0] - both[row]).norm() <= 0.02 * both[row].norm()


def test_bad_input() -> None:
    with pytest.raises(InputError, match="kind must be one of fp8, int8, nf4, but it is 'fp4'"):
        quantize_base(make_base(), "fp4")
    base = make_base()
    GenerativeAdapter(base, make_config())
    with pytest.raises(InputError, match="before it is passed"):
        quantize_base(base, "fp8")
    base = quantize_base(make_base(), "fp8")
    with pytest.raises(InputError, match="quantised already"):
        quantize_base(base, "fp8")
    base = make_base()
    base.model.layers[2].mlp.up_proj.double()
    with pytest.raises(InputError, match="float64"):
        quantize_base(base, "fp8")
    assert not any(isinstance(module, Float8Linear) for module in base.modules())
    assert "_gakernels_fingerprint" not in vars(base)


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    base = make_base()
    for kind in ("int8", "nf4"):
        with pytest.raises(BackendError, match="pip install bitsandbytes"):
            quantize_base(base, kind)
    assert type(base.model.layers[0].mlp.up_proj) is nn.Linear
