"""merge and unmerge: the adapter in the weights of the base model, and the weights back."""

from pathlib import Path

import pytest
import torch
from tiny import logits_of, make_model, plain_copy, random_context, random_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gakernels import FormatError, InputError


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_merged_logits_are_those_of_the_adapter(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model, ids = make_model(family, dtype), random_ids(3, 8)
    adapter = model.adapt([random_context(20)])[0]
    plain = logits_of(model.base, ids)
    with model.adapted(adapter):
        expected = logits_of(model.base, ids)
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    model.merge(adapter)
    assert (logits_of(model.base, ids) - expected).norm() < tolerance * expected.norm()
    changed = [name for name, tensor in model.base.state_dict().items() if not torch.equal(tensor, before[name])]
    assert sorted(changed) == sorted(f"{name}.weight" for name in model.adapted_names)
    model.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base.state_dict().items())
    assert torch.equal(logits_of(model.base, ids), plain)
    model.unmerge()  # nothing is merged: nothing happens
    assert torch.equal(logits_of(model.base, ids), plain)


def test_a_merged_weight_is_the_weight_plus_the_delta() -> None:
    model = make_model(base_dtype=torch.bfloat16)
    adapter = model.adapt([random_context(20)])[0]
    name = model.adapted_names[1]
    weight = model.base.get_submodule(name).weight.clone()
    model.merge(adapter)
    product = 0.5 * (adapter.lora_b[name].double() @ adapter.lora_a[name].double())
    expected = weight.double() + product
    error = (model.base.get_submodule(name).weight - expected).abs()
    assert (error <= 2.0**-8 * expected.abs() + 1e-6).all()  # rounded once, to bfloat16


def test_nothing_else_can_be_used_while_an_adapter_is_merged() -> None:
    model = make_model()
    stream = model.stream().append(random_context(10))
    adapter = stream.adapter()
    model.merge(adapter)
    merged = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    with pytest.raises(InputError, match=r"merged.*unmerge\(\)"):
        model.merge(adapter)
    with pytest.raises(InputError, match=r"merged.*unmerge\(\)"), model.adapted(adapter):
        pass
    with pytest.raises(InputError, match=r"merged.*unmerge\(\)"):
        stream.append(random_context(4))
    assert all(torch.equal(tensor, merged[name]) for name, tensor in model.base.state_dict().items())
    model.unmerge()
    with model.adapted(adapter):
        stream.append(random_context(4))
    model.merge(stream.adapter())


def test_nothing_can_be_merged_while_an_adapter_is_in_use() -> None:
    model = make_model()
    adapter = model.adapt([random_context(10)])[0]
    with model.adapted(adapter), pytest.raises(InputError, match="in use"):
        model.merge(adapter)
    model.merge(adapter)


def test_the_fingerprint_of_the_base_is_the_same_while_an_adapter_is_merged() -> None:
    model = make_model()
    adapter = model.adapt([random_context(10)])[0]
    model.merge(adapter)
    assert model.base_fingerprint() == adapter.base_fingerprint


def test_detach_takes_a_merged_adapter_out() -> None:
    model, ids = make_model(), random_ids(2, 8)
    expected = logits_of(model.base, ids)
    model.merge(model.adapt([random_context(10)])[0])
    assert not torch.equal(logits_of(model.base, ids), expected)
    assert torch.equal(logits_of(model.detach(), ids), expected)


def test_a_merged_model_can_be_saved_as_a_plain_one() -> None:
    model, ids = make_model(), random_ids(2, 8)
    model.merge(model.adapt([random_context(10)])[0])
    assert torch.equal(logits_of(plain_copy(model), ids), logits_of(model.base, ids))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
def test_a_merged_model_is_a_folder_that_transformers_loads(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    model, ids = make_model(family, tokenizer=tokenizer), random_ids(2, 8)
    plain = logits_of(model.base, ids)
    adapter = model.adapt([random_context(20)])[0]
    with model.adapted(adapter):
        expected = logits_of(model.base, ids)
    model.save_merged(adapter, tmp_path / "merged")
    attention = model.base.config._attn_implementation  # before transformers 5.21 the default leaves out a soft cap
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation=attention)
    found = logits_of(merged.eval(), ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w7 w9")["input_ids"] == [1, 7, 9]
    assert torch.equal(logits_of(model.base, ids), plain)


def test_a_merged_model_that_can_not_be_written_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    model, ids = make_model(), random_ids(2, 8)
    plain, adapter = logits_of(model.base, ids), model.adapt([random_context(20)])[0]
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError, match="taken is a file"):
        model.save_merged(adapter, tmp_path / "taken")
    with pytest.raises(FormatError, match="belongs to a base model"):
        model.save_merged(make_model().adapt([random_context(9)])[0], tmp_path / "other")
    assert torch.equal(logits_of(model.base, ids), plain)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    model.merge(adapter)  # nothing is merged
