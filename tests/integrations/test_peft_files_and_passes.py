"""Files, copies, gradient checkpointing and compilation of a model whose LoRA layers run on `lowrank_linear`."""

import copy
import io
import json
from pathlib import Path

import peft
import pytest
import torch
from lora_models import D_IN, Calls, assert_same, everything, lora_layer, one_layer, with_adapters
from tiny import make_base, random_ids
from torch import Tensor

from gakernels.integrations.peft import LowRankLoraLinear, use_lowrank_linear
from gakernels.ops.dispatch import ENVIRONMENT_VARIABLE

CONFIG = {"r": 4, "target_modules": ["q_proj", "o_proj"], "lora_alpha": 6}


def test_names_and_files_are_those_of_peft(tmp_path: Path) -> None:
    own, ids = with_adapters(make_base(), CONFIG), random_ids(2, 7)
    ours = copy.deepcopy(own)
    use_lowrank_linear(ours)
    assert list(ours.state_dict()) == list(own.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in own.named_modules()]
    ours.save_pretrained(tmp_path / "ours")
    own.save_pretrained(tmp_path / "own")
    files = {path.relative_to(tmp_path / "own") for path in (tmp_path / "own").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*") if path.is_file()}
    for file in files:
        found, wanted = ((tmp_path / kind / file).read_bytes() for kind in ("ours", "own"))
        if file.suffix == ".json":  # the target modules are a set, written in any order
            found, wanted = (
                {**json.loads(text), "target_modules": sorted(json.loads(text)["target_modules"])}
                for text in (found, wanted)
            )
        assert found == wanted, file
    base = make_base()
    base.load_state_dict(own.unload().state_dict())
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours" / "one")
    assert_same({"y": loaded(input_ids=ids).logits}, {"y": ours(input_ids=ids).logits}, 1e-5)


def test_copies_and_pickles_keep_running_on_the_operation(calls: Calls) -> None:
    model, x = one_layer({}), torch.randn(4, D_IN, dtype=torch.float64)
    use_lowrank_linear(model)
    wanted = everything(model, model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    calls.look()
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(lora_layer(other)) is LowRankLoraLinear
        found = everything(other, other, x)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert calls.look() == 1
        with torch.no_grad():  # its own parameters, not those of the original
            lora_layer(other).lora_B["one"].weight.zero_()
        assert not torch.equal(other(x), wanted["y"])
        assert torch.equal(model(x), wanted["y"])
        calls.look()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, calls: Calls) -> None:
    model, ids = with_adapters(make_base().double(), CONFIG).double().train(), random_ids(2, 7)

    def run(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    wanted = everything(model, run, ids)
    use_lowrank_linear(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same(everything(model, run, ids), wanted)
    assert calls.look() == 2 * 6  # forward, and again in the backward


@pytest.mark.parametrize("active", [["one"], ["one", "two"]])
def test_compiled_without_a_graph_break(active: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)  # the plain definition is no operator
    model = one_layer({}, {"r": 3, "lora_bias": True})
    model.base_model.set_adapter(active)
    x = torch.randn(3, 4, D_IN, dtype=torch.float64)
    wanted = everything(model, model, x)
    use_lowrank_linear(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(everything(model, compiled, x), wanted)
    graphs = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(model, fullgraph=True, backend=record)(x)
    assert "torch.ops.gakernels" in graphs[0].code


def test_a_compiled_model_follows_the_change_of_its_adapters() -> None:
    model = one_layer({}, {"r": 3, "lora_dropout": 0.5})
    x = torch.randn(3, 4, D_IN, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    before = everything(model, compiled, x)
    use_lowrank_linear(model)
    assert_same(everything(model, compiled, x), before)
    model.set_adapter("two")
    assert_same(everything(model, compiled, x), everything(model, model, x))
    with model.disable_adapter():
        assert torch.equal(compiled(x), lora_layer(model).base_layer(x))
    model.train()  # dropout: PEFT's own forward, and no warning, which would break the graph
    torch.manual_seed(0)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.manual_seed(0)
    assert torch.equal(found, model(x))


def saved_per_token(model: torch.nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward, in tensors with an entry per token."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if x.shape[1] in tensor.shape or x.shape[:2].numel() in tensor.shape:
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(saved.values())


def test_float32_factors_on_a_bfloat16_base_keep_half_as_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT keeps its input as float32 for the gradient of lora_A; the operation keeps it as it is."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)  # the plain definition saves what autograd wants
    model, x = one_layer({}, dtype=torch.bfloat16), torch.randn(2, 101, D_IN).bfloat16()
    own = saved_per_token(model, x)
    use_lowrank_linear(model)
    assert 2 * 202 * (D_IN + 4) == saved_per_token(model, x) <= own / 2
