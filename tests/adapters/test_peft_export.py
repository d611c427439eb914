"""The PEFT folder, read by PEFT itself, and vLLM's rules for it."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import logits_of, make_model, plain_copy, random_context, random_ids
from transformers import AutoModelForCausalLM

from gakernels import InputError

CASES = [
    ("llama", {"linears": ("o_proj", "down_proj")}, ["down_proj", "o_proj"]),
    ("llama", {"linears": ("o_proj",)}, ["o_proj"]),
    (
        "llama",
        {"linears": ("o_proj", "down_proj"), "layers": (0, 2)},
        [f"model.layers.{i}.{name}" for i in (0, 2) for name in ("mlp.down_proj", "self_attn.o_proj")],
    ),
    ("llama", {"norm": "frobenius"}, ["down_proj", "o_proj"]),
    ("qwen2", {}, ["o_proj", "q_proj", "v_proj"]),
    ("gemma2", {}, ["down_proj", "o_proj"]),
    ("phi3", {}, ["down_proj", "o_proj", "qkv_proj"]),
    ("gpt_neox", {}, ["dense", "dense_4h_to_h"]),
]


@pytest.mark.parametrize(("family", "settings", "targets"), CASES)
def test_peft_computes_the_same_logits(
    tmp_path: Path, family: str, settings: dict[str, object], targets: list[str]
) -> None:
    model, ids = make_model(family, **settings), random_ids(3, 8)
    base = plain_copy(model)
    plain = logits_of(base, ids)
    adapter = model.adapt([random_context(20)])[0]
    with model.adapted(adapter):
        expected = logits_of(model.base, ids)
    adapter.save_peft(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == targets
    other = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    found = logits_of(other, ids)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - plain).abs().max() > 1e-3 * expected.abs().max()
    layers = {
        name.removeprefix("base_model.model.") for name, module in other.named_modules() if hasattr(module, "lora_A")
    }
    assert layers == set(model.adapted_names)


def test_the_files_say_what_other_readers_expect(tmp_path: Path) -> None:
    model = make_model(layers=(1,), linears=("o_proj",))
    model.base.save_pretrained(tmp_path / "base")
    model.base.config.name_or_path = str(tmp_path / "base")
    adapter = model.adapt([random_context(20)])[0]
    adapter.save_peft(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tmp_path / "base"),
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["model.layers.1.self_attn.o_proj"],
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.o_proj"
    a, b = (tensors.pop(f"base_model.model.{name}.lora_{letter}.weight") for letter in "AB")
    assert not tensors
    assert torch.equal(a, adapter.lora_a[name])
    assert torch.equal(b, 0.5 * adapter.lora_b[name])
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")  # finds the base model by its name
    assert loaded.active_peft_config.r == 4


def test_short_names_are_used_only_where_they_select_the_adapted_layers_alone(tmp_path: Path) -> None:
    model = make_model()
    model.base.tower = torch.nn.Module()
    model.base.tower.o_proj = torch.nn.Linear(4, 4)
    base = model.detach()
    other = type(model)(base, model.config)
    adapter = other.adapt([random_context(20)])[0]
    names = [name for name in other.adapted_names if name.endswith("o_proj")]
    assert sorted(adapter.target_modules) == sorted(["down_proj", *names])


def test_an_existing_adapter_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    model = make_model()
    first, second = model.adapt([random_context(20), random_context(20)])
    first.save_peft(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    second.save_peft(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = model.adapted_names[0]
    assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], second.lora_a[name])
    assert not [file for file in tmp_path.parent.iterdir() if file.name.endswith((".tmp", ".old"))]


def test_a_half_precision_base_loads_the_export(tmp_path: Path) -> None:
    model, ids = make_model(base_dtype=torch.bfloat16), random_ids(3, 8)
    adapter = model.adapt([random_context(20)])[0]
    with model.adapted(adapter):
        expected = logits_of(model.base, ids)
    adapter.to(dtype=torch.bfloat16).save_peft(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    plain_copy(model).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    found = logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), ids)
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(("rank", "padded"), [(1, 1), (3, 8), (8, 8), (9, 16), (33, 64)])
def test_for_vllm_the_rank_is_filled_up_with_zeros(tmp_path: Path, rank: int, padded: int) -> None:
    model, ids = make_model(state_size=40, rank=rank), random_ids(3, 8)
    adapter = model.adapt([random_context(20)])[0]
    with model.adapted(adapter):
        expected = logits_of(model.base, ids)
    adapter.save_peft(tmp_path / "adapter", for_vllm=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (padded, padded)
    assert (config["bias"], config["use_rslora"], config["use_dora"]) == ("none", False, False)
    assert not config.get("modules_to_save")
    for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        assert tensor.shape[0 if ".lora_A." in name else 1] == padded
        assert not (tensor[rank:] if ".lora_A." in name else tensor[:, rank:]).any()
    found = logits_of(peft.PeftModel.from_pretrained(plain_copy(model), tmp_path / "adapter"), ids)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_vllm_can_not_load_is_refused(tmp_path: Path) -> None:
    adapter = make_model("gpt_neox").adapt([random_context(9)])[0]
    with pytest.raises(
        InputError, match=r"vLLM can't load an adapter of gpt_neox\.layers\.0\.attention\.dense;.*o_proj"
    ):
        adapter.save_peft(tmp_path / "adapter", for_vllm=True)
    wide = make_model(layers=(0,), linears=("o_proj",), state_size=520, rank=513).adapt([random_context(9)])[0]
    with pytest.raises(InputError, match="rank 512 at most, but this one has 513"):
        wide.save_peft(tmp_path / "adapter", for_vllm=True)
    assert not list(tmp_path.iterdir())
