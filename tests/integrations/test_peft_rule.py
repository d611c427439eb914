"""What keeps PEFT's own forward, that it is said, and that the result is PEFT's."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from lora_models import (
    D_IN,
    D_OUT,
    Calls,
    OneLayer,
    assert_same,
    everything,
    lora_layer,
    one_layer,
    randomise,
    with_adapters,
)
from peft.helpers import disable_input_dtype_casting
from tiny import make_base, random_ids
from torch import Tensor, nn

from gakernels import InputError
from gakernels.integrations.peft import LowRankLoraLinear, use_lowrank_linear


class Mixed(nn.Module):
    """Layers of every kind that PEFT can adapt, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, D_IN)
        self.linear = nn.Linear(D_IN, D_OUT)
        self.convolution = nn.Conv1d(D_OUT, D_IN, 1)
        self.attention = nn.MultiheadAttention(D_IN, 2, batch_first=True)
        self.last = nn.Linear(D_IN, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.convolution(self.linear(self.embedding(ids)).mT).mT
        return self.last(self.attention(x, x, x, need_weights=False)[0])


def test_layers_of_other_kinds_are_left_and_named(calls: Calls) -> None:
    targets = ["embedding", "linear", "convolution", "attention", "last"]
    model = with_adapters(Mixed().double(), {"r": 2, "target_modules": targets}).double()
    ids = torch.randint(20, (3, 5))
    wanted = everything(model, model, ids)
    report = use_lowrank_linear(model)
    prefix = "base_model.model."
    assert report.changed == (prefix + "linear", prefix + "last")
    assert report.left == {
        prefix + "embedding": "the layer is a peft Embedding, not peft's lora.Linear for nn.Linear and Conv1D",
        prefix + "convolution": "the layer is a peft Conv1d, not peft's lora.Linear for nn.Linear and Conv1D",
        prefix + "attention": "the layer is a peft MultiheadAttention, not peft's lora.Linear for nn.Linear and Conv1D",
        prefix + "attention.base_layer.out_proj": "its base layer is a NonDynamicallyQuantizableLinear",
    }
    assert not report.except_when
    assert str(report).splitlines() == [
        "LoRA layers on lowrank_linear: 2",
        *(f"left on PEFT's own forward ({reason}): 1, first {name}" for name, reason in report.left.items()),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(everything(model, model, ids), wanted)
    assert calls.look() == 2


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def other_base_layer() -> nn.Module:
    base = OneLayer()
    base.linear = Doubled(D_IN, D_OUT)
    return with_adapters(base, {"target_modules": ["linear"]})


def trainable_base() -> nn.Module:
    model = one_layer({})
    lora_layer(model).base_layer.weight.requires_grad_()
    return model


def small_base() -> nn.Module:
    model = one_layer({})
    base = lora_layer(model).base_layer
    base.weight = nn.Parameter(base.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def parametrised_factor() -> nn.Module:
    model = one_layer({})
    nn.utils.parametrizations.weight_norm(lora_layer(model).lora_A["one"])
    return model


def another_tuner_inside() -> nn.Module:
    inner = peft.inject_adapter_in_model(peft.LoHaConfig(target_modules=["linear"]), OneLayer())
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["linear"]), inner, adapter_name="outer")


def wrapped_forward() -> nn.Module:
    """As accelerate does for layers whose weights it brings from elsewhere."""
    model = one_layer({})
    base = lora_layer(model).base_layer
    plain = base.forward
    base.forward = lambda x: plain(x)
    return model


UNABLE = {
    "no LoRA": (OneLayer, "model must have LoRA layers of peft, but it has none"),
    "other tuner": (
        lambda: peft.get_peft_model(OneLayer(), peft.LoHaConfig(target_modules=["linear"])),
        "model must have LoRA layers of peft, but it has none",
    ),
    "DoRA": (lambda: one_layer({"use_dora": True}), "adapter 'one' is not a plain LoRA but a DoraLinearVariant"),
    "other base layer": (other_base_layer, "its base layer is a Doubled"),
    "trainable base weight": (trainable_base, "its base weight is trainable"),
    "float8 base weight": (small_base, "its base layer has a weight of type Parameter, torch.float8_e4m3fn"),
    "parametrised factor": (parametrised_factor, "lora_A of adapter 'one' is a ParametrizedLinear"),
    "another tuner inside": (another_tuner_inside, "its base layer is a Linear"),
    "wrapped forward": (wrapped_forward, "its base layer has hooks, or a forward of its own"),
    "parameter of a module": (
        lambda: peft.inject_adapter_in_model(peft.LoraConfig(target_parameters=["linear.weight"]), OneLayer()),
        "the layer is a peft ParamWrapper",
    ),
}


@pytest.mark.parametrize("kind", UNABLE)
def test_a_model_where_nothing_can_be_done_is_refused_and_not_changed(kind: str) -> None:
    make, message = UNABLE[kind]
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        use_lowrank_linear(model)
    assert [type(module) for module in model.modules()] == classes


def test_dropout_in_training_is_pefts_own_and_in_eval_mode_it_is_not(calls: Calls) -> None:
    own = one_layer({"lora_dropout": 0.4})
    ours, x = copy.deepcopy(own), torch.randn(3, 4, D_IN, dtype=torch.float64)
    report = use_lowrank_linear(ours)
    reason = "adapter 'one' has lora_dropout 0.4 and is in training mode"
    assert report.changed == ("base_model.model.linear",)
    assert report.except_when == {"base_model.model.linear": reason}
    assert reason in str(report)
    assert_same(everything(ours, ours, x), everything(own, own, x))
    assert calls.look() == 1
    seed, results = torch.randint(1 << 30, ()).item(), []
    for model in (ours.train(), own.train()):
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(everything(model, model, x))
        assert [str(warning.message) for warning in caught] == [
            f"a LoRA layer runs PEFT's own forward instead of lowrank_linear: {reason}"
        ] * (model is ours)
    assert calls.look() == 0
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_only_the_adapters_that_can_run_do(calls: Calls) -> None:
    own = one_layer({}, {"use_dora": True}, {"lora_dropout": 0.5})
    ours, x = copy.deepcopy(own), torch.randn(4, D_IN, dtype=torch.float64)
    exceptions = use_lowrank_linear(ours).except_when["base_model.model.linear"]
    assert exceptions == (
        "adapter 'two' is not a plain LoRA but a DoraLinearVariant; "
        "adapter 'three' has lora_dropout 0.5 and is in training mode"
    )
    for active, training, expected in (
        (["one"], True, 1),
        (["one", "three"], False, 1),
        (["three"], True, 0),
        (["two"], False, 0),
        (["one", "two"], False, 0),
    ):
        results = []
        for model in (ours, own):
            model.base_model.set_adapter(active)
            torch.manual_seed(0)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results.append(everything(model.train(training), model, x))
            own_forward = [warning for warning in caught if "runs PEFT's own forward" in str(warning.message)]
            assert len(own_forward) == (model is ours and expected == 0)
        assert_same(*results)
        assert calls.look() == expected


def test_hooks_on_the_parts_of_a_layer_still_run(calls: Calls) -> None:
    model, x = one_layer({}), torch.randn(4, D_IN, dtype=torch.float64)
    layer = lora_layer(model)
    use_lowrank_linear(model)
    wanted = model(x)
    assert calls.look() == 1
    for part in (layer.base_layer, layer.lora_A["one"], layer.lora_B["one"], layer.lora_dropout["one"]):
        seen = []
        hook = part.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        with pytest.warns(UserWarning, match="has hooks, or a forward of its own"):
            assert_same({"y": model(x)}, {"y": wanted})
        assert len(seen) == 1
        assert calls.look() == 0
        hook.remove()
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(model(x), seen[0])
    assert calls.look() == 1


def change_to_trainable(layer: Any) -> None:
    layer.base_layer.weight.requires_grad_()


def change_forward(layer: Any) -> None:
    plain = layer.base_layer.forward
    layer.base_layer.forward = lambda x: plain(x)


@pytest.mark.parametrize("change", [change_to_trainable, change_forward])
def test_a_layer_that_changes_afterwards(change: Any, calls: Calls) -> None:
    own = one_layer({})
    ours, x = copy.deepcopy(own), torch.randn(4, D_IN, dtype=torch.float64)
    use_lowrank_linear(ours)
    for model in (ours, own):
        change(lora_layer(model))
    with pytest.warns(UserWarning, match="runs PEFT's own forward"):
        assert_same(everything(ours, ours, x), everything(own, own, x))
    with pytest.raises(InputError, match="must have a LoRA layer that can run"):
        use_lowrank_linear(ours)  # brings the choice up to date
    assert not any(isinstance(module, LowRankLoraLinear) for module in ours.modules())
    assert calls.look() == 0


def test_input_casting_that_peft_was_told_to_leave_out(calls: Calls) -> None:
    model, x = one_layer({}), torch.randn(4, D_IN, dtype=torch.float64)
    use_lowrank_linear(model)
    with disable_input_dtype_casting(model), pytest.warns(UserWarning, match="casting of its input is disabled"):
        model(x)
    assert calls.look() == 0
    model(x)
    assert calls.look() == 1


def test_an_argument_that_the_base_layer_does_not_know_is_an_error_as_before() -> None:
    model, x = one_layer({}), torch.randn(4, D_IN, dtype=torch.float64)
    use_lowrank_linear(model)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        lora_layer(model)(x, scale=2)


def test_a_layer_whose_adapters_are_all_deleted(calls: Calls) -> None:
    configs = [{"target_modules": ["o_proj"]}, {"target_modules": ["down_proj"]}]
    model, ids = with_adapters(make_base(), *configs), random_ids(2, 6)
    randomise(model)
    use_lowrank_linear(model)
    model.delete_adapter("two")
    model.set_adapter("one")
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
    assert not torch.equal(model(input_ids=ids).logits, plain)
    assert calls.look() == 3
    report = use_lowrank_linear(model)
    assert len(report.changed) == 3
    assert set(report.left.values()) == {"it has no adapter"}
