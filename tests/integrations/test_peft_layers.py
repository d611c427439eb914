"""Every kind of PEFT's LoRA on `lowrank_linear`: outputs and gradients are PEFT's own."""

import copy
from typing import Any

import peft
import pytest
import torch
from lora_models import D_IN, D_OUT, Calls, assert_same, everything, lora_layer, one_layer, randomise, with_adapters
from tiny import add_lora, make_base, random_ids
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from gakernels.integrations.peft import LowRankLoraLinear, restore, use_lowrank_linear

LLAMA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "down_proj"]}
MODELS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "plain": ("llama", [LLAMA]),
    "base with bias": ("llama_bias", [LLAMA]),
    "rslora": ("llama", [{**LLAMA, "use_rslora": True}]),
    "patterns": ("llama", [{**LLAMA, "rank_pattern": {"o_proj": 7}, "alpha_pattern": {"down_proj": 3}}]),
    "lora_bias": ("llama_bias", [{**LLAMA, "lora_bias": True}]),
    "trainable biases": ("llama_bias", [{**LLAMA, "bias": "all"}]),
    "trainable biases of the adapted layers": ("llama_bias", [{**LLAMA, "bias": "lora_only"}]),
    "dropout in eval mode": ("llama", [{**LLAMA, "lora_dropout": 0.5}]),
    "pissa": ("llama", [{**LLAMA, "init_lora_weights": "pissa"}]),
    "olora": ("llama", [{**LLAMA, "init_lora_weights": "olora"}]),
    "some layers": ("qwen2", [{**LLAMA, "layers_to_transform": [1]}]),
    "fused linears": ("phi3", [{"r": 3, "target_modules": ["qkv_proj", "gate_up_proj"]}]),
    "all linears": ("gemma2", [{"r": 2, "target_modules": "all-linear"}]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_language_model_gives_the_same_logits_and_gradients(kind: str, calls: Calls) -> None:
    family, configs = MODELS[kind]
    model = with_adapters(make_base(family), *configs).double()
    ids = random_ids(2, 7)

    def run(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    wanted = everything(model, run, ids)
    assert len(wanted) > 1
    report = use_lowrank_linear(model)
    assert not report.left
    found = everything(model, run, ids)
    assert calls.look() == len(report.changed) > 0
    assert_same(found, wanted)


def test_gpt2_with_its_transposed_weights(calls: Calls) -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=2, n_positions=16)).double()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = with_adapters(base, {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}).double()
    ids = random_ids(2, 7)

    def run(ids: Tensor) -> Tensor:
        return model(input_ids=ids).logits

    wanted = everything(model, run, ids)
    assert len(use_lowrank_linear(model).changed) == 6
    assert_same(everything(model, run, ids), wanted)
    assert calls.look() == 6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(D_IN,), (5, D_IN), (3, 4, D_IN), (2, 3, 4, D_IN), (0, D_IN), (2, 0, D_IN)])
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...], bias: bool, calls: Calls) -> None:
    model, x = one_layer({}, bias=bias), torch.randn(shape, dtype=torch.float64)
    wanted = everything(model, model, x)
    use_lowrank_linear(model)
    found = everything(model, model, x)
    assert calls.look() == 1
    assert found["y"].shape == (*shape[:-1], D_OUT)
    if x.numel():
        assert_same(found, wanted)


def test_an_input_that_is_not_contiguous(calls: Calls) -> None:
    model, x = one_layer({}), torch.randn(D_IN, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    wanted = everything(model, model, x)
    use_lowrank_linear(model)
    assert_same(everything(model, model, x), wanted)
    assert calls.look() == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, D_IN), (3, 4, D_IN)])
def test_an_output_that_is_changed_in_place(shape: tuple[int, ...], bias: bool, calls: Calls) -> None:
    model, x = one_layer({}, bias=bias), torch.randn(shape, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        y = model(x)
        y += 1
        return y.relu_()

    wanted = everything(model, run, x)
    use_lowrank_linear(model)
    assert_same(everything(model, run, x), wanted)
    assert calls.look() == 1


ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "ranks": [{"r": 4}, {"r": 7, "lora_alpha": 3}, {"r": 1, "use_rslora": True}],
    "lora_bias": [{"lora_bias": True}, {}, {"lora_bias": True, "lora_alpha": 1}],
    "trainable base bias": [{}, {}, {}],
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("active", [["one", "two", "three"], ["three", "one"], ["two"]])
def test_several_active_adapters_in_one_call(kind: str, active: list[str], calls: Calls) -> None:
    model = one_layer(*ADAPTERS[kind])
    model.base_model.set_adapter(active)
    lora_layer(model).base_layer.bias.requires_grad_(kind == "trainable base bias")
    x = torch.randn(3, 4, D_IN, dtype=torch.float64)
    wanted = everything(model, model, x)
    use_lowrank_linear(model)
    assert_same(everything(model, model, x), wanted)
    assert calls.look() == 1


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("shape", [(6, D_IN), (6, 5, D_IN), (6, 2, 3, D_IN)])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_batch_with_an_adapter_for_each_row(
    kind: str, shape: tuple[int, ...], with_gradients: bool, calls: Calls
) -> None:
    model = one_layer(*ADAPTERS[kind])
    lora_layer(model).requires_grad_(with_gradients)
    lora_layer(model).base_layer.weight.requires_grad_(False)
    lora_layer(model).base_layer.bias.requires_grad_(with_gradients and kind == "trainable base bias")
    x = torch.randn(shape, dtype=torch.float64)
    rows = ["two", "__base__", "one", "three", "two", "__base__"]

    def run(x: Tensor) -> Tensor:
        return model(x, adapter_names=rows)

    wanted = everything(model, run, x)
    use_lowrank_linear(model)
    assert_same(everything(model, run, x), wanted)
    assert calls.look() == 1
    with torch.no_grad():
        assert_same({"y": run(x)}, {"y": wanted["y"]})


def test_rows_with_an_adapter_that_a_layer_does_not_have(calls: Calls) -> None:
    configs = [{"r": 2, "target_modules": ["o_proj"]}, {"r": 3, "target_modules": ["down_proj"]}]
    model, ids = with_adapters(make_base().double(), *configs).double(), random_ids(4, 6)
    rows = ["one", "two", "__base__", "one"]
    wanted = model(input_ids=ids, adapter_names=rows).logits
    report = use_lowrank_linear(model)
    found = model(input_ids=ids, adapter_names=rows).logits
    assert calls.look() == len(report.changed) == 6
    assert_same({"y": found}, {"y": wanted})
    plain = model(input_ids=ids, adapter_names=["__base__"] * 4).logits
    assert calls.look() == 0
    with model.disable_adapter():
        assert torch.equal(plain, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(input_ids=ids, adapter_names=rows[:3])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(input_ids=ids, adapter_names=["four"] * 4)


def test_all_that_may_happen_to_adapters_afterwards(calls: Calls) -> None:
    """The same steps on a model with the operation and on its twin without, compared after each."""
    own = with_adapters(make_base().double(), LLAMA, {**LLAMA, "r": 2}, autocast_adapter_dtype=False).double()
    ours, ids = copy.deepcopy(own), random_ids(2, 7)
    use_lowrank_linear(ours)
    layers = 9

    def compare(expected_calls: int, **keywords: Any) -> None:
        found, wanted = (model(input_ids=ids, **keywords).logits for model in (ours, own))
        assert_same({"y": found}, {"y": wanted})
        assert calls.look() == expected_calls

    def both(step: Any) -> None:
        step(ours)
        step(own)

    compare(layers)
    both(lambda model: model.set_adapter("two"))
    compare(layers)
    both(lambda model: model.base_model.set_adapter(["one", "two"]))
    compare(layers)
    both(lambda model: model.add_adapter("three", peft.LoraConfig(r=5, target_modules=["k_proj", "o_proj"])))
    both(lambda model: model.double())
    randomise(own)
    ours.load_state_dict(own.state_dict())
    both(lambda model: model.set_adapter("three"))
    compare(3)  # k_proj has got its LoRA layer from PEFT just now
    assert len(use_lowrank_linear(ours).changed) == layers + 3
    compare(6)
    compare(12, adapter_names=["one", "three"])
    both(lambda model: [m.set_scale("three", 3.0) for m in model.modules() if hasattr(m, "set_scale")])
    compare(6)
    with ours.disable_adapter(), own.disable_adapter():
        compare(0)
    compare(6)
    both(lambda model: model.merge_adapter())
    compare(0)
    both(lambda model: model.unmerge_adapter())
    compare(6)
    both(lambda model: model.delete_adapter("three"))
    both(lambda model: model.set_adapter("one"))
    compare(layers)
    both(lambda model: model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "blend", combination_type="cat"))
    both(lambda model: model.set_adapter("blend"))
    compare(layers)
    merged, wanted = (model.merge_and_unload()(input_ids=ids).logits for model in (ours, own))
    assert_same({"y": merged}, {"y": wanted})
    assert not any(isinstance(module, LowRankLoraLinear) for module in ours.modules())


def test_restore_gives_back_the_bits_and_the_class(calls: Calls) -> None:
    model, ids = with_adapters(make_base(), LLAMA), random_ids(2, 7)
    classes = [type(module) for module in model.modules()]
    before = model(input_ids=ids).logits
    use_lowrank_linear(model)
    assert [type(module) for module in model.modules()] != classes
    model(input_ids=ids)
    assert calls.look() > 0
    restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(input_ids=ids).logits, before)
    assert calls.look() == 0
    restore(model)  # nothing left to do


def test_an_adapter_that_transformers_added(calls: Calls) -> None:
    model, ids = make_base().double(), random_ids(2, 7)
    add_lora(model, peft.LoraConfig(**LLAMA))
    randomise(model)
    model.double()
    wanted = model(input_ids=ids).logits
    report = use_lowrank_linear(model)
    assert "model.layers.0.self_attn.q_proj" in report.changed
    assert_same({"y": model(input_ids=ids).logits}, {"y": wanted})
    assert calls.look() == len(report.changed) == 9


def test_training_takes_the_same_steps(calls: Calls) -> None:
    own = with_adapters(make_base("llama_bias").double(), {**LLAMA, "bias": "all"}).double().train()
    ours = copy.deepcopy(own)
    use_lowrank_linear(ours)
    data, losses = [random_ids(2, 7) for _ in range(4)], []
    for model in (own, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for ids in data:
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert calls.look() == 4 * 9
    assert_same({"loss": losses[1], **ours.state_dict()}, {"loss": losses[0], **own.state_dict()})
