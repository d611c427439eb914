"""Whole layers that are recomputed in the backward: the same bits, in every family."""

import copy
import pickle

import pytest
import torch
from tiny import FAMILIES, make_model, random_ids
from torch import Tensor

from gakernels import GenerativeAdapter
from gakernels.cost.memory import Recomputation, set_recomputation
from gakernels.model.attachment import decoder_layers
from gakernels.model.compilation import uncompile_layers
from gakernels.nn.cpu_attention import CpuAttention

EVERY = Recomputation(whole=(0, 1, 2))


def losses_and_gradients(model: GenerativeAdapter, ids: Tensor) -> list[Tensor]:
    hidden, states = model(ids, torch.ones_like(ids, dtype=torch.bool), 3, (0, 1, 2, 1, 2, 3))
    loss = hidden.float().square().mean() + sum(state.square().mean() for state in states.values())
    return [loss.detach(), *torch.autograd.grad(loss, list(model.generators.parameters()))]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_keep_every_bit(family: str, dtype: torch.dtype) -> None:
    model, ids = make_model(family, base_dtype=dtype), random_ids(2, 6, 5)
    assert len(decoder_layers(model.base)[1]) == 3
    wanted = losses_and_gradients(model, ids)
    set_recomputation(model, EVERY)
    assert_same(losses_and_gradients(model, ids), wanted)
    set_recomputation(model, Recomputation(whole=(1,)))
    assert_same(losses_and_gradients(model, ids), wanted)


def test_with_generators_on_a_second_stream_and_in_a_copy() -> None:
    model, ids = make_model(), random_ids(2, 6, 5)
    wanted = losses_and_gradients(model, ids)
    set_recomputation(model, EVERY)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in other.generators.parameters():
                parameter.zero_()
        losses_and_gradients(other, ids)  # with its own adapters, which are zero
    assert_same(losses_and_gradients(model, ids), wanted)
    model.overlap_generators()
    assert_same(losses_and_gradients(model, ids), wanted)  # the adapters are formed before the layer, as without it


def test_the_attention_and_the_adapter_of_the_forward_are_recomputed_with() -> None:
    model, ids = make_model(base_dtype=torch.bfloat16), random_ids(2, 16)
    adapter, other = model.adapt(random_ids(9)), model.adapt(random_ids(9))
    embedded = model.base.get_input_embeddings()(ids).detach()

    def gradient(attention: bool) -> Tensor:
        inputs = embedded.clone().requires_grad_()
        with model.adapted(adapter):
            if attention:
                with CpuAttention():
                    hidden = model.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
            else:
                hidden = model.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
        with model.adapted(other):
            return torch.autograd.grad(hidden.float().square().mean(), inputs)[0]

    wanted = [gradient(attention) for attention in (False, True)]
    assert not torch.equal(*wanted)
    set_recomputation(model, EVERY)
    assert_same([gradient(attention) for attention in (False, True)], wanted)


def test_it_outlasts_compiled_layers_and_ends_with_the_generators() -> None:
    model = make_model()
    set_recomputation(model, EVERY)
    uncompile_layers(model.base)
    assert all("forward" in vars(layer) for layer in decoder_layers(model.base)[1])
    assert not any("forward" in vars(layer) for layer in decoder_layers(model.detach())[1])


def test_only_the_input_of_a_layer_is_kept() -> None:
    model = make_model(linears=("gate_proj", "o_proj"))

    def kept() -> int:
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.update({tensor.data_ptr(): tensor.nbytes}) or tensor, lambda tensor: tensor
        ):
            layer, hidden = decoder_layers(model.base)[1][1], torch.randn(12, 5, 32, requires_grad=True)
            rotary = model.decoder.rotary_emb(hidden, torch.arange(5)[None])
            layer(hidden, position_embeddings=rotary)
        return sum(sizes.values())

    before = kept()
    set_recomputation(model, EVERY)
    assert kept() <= 12 * 5 * 32 * 4 < before / 4
