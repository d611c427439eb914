"""Adapters and generators in files: bit by bit the same after loading, refused where they do not belong."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import (
    logits_of,
    make_base,
    make_config,
    make_model,
    make_trained,
    plain_copy,
    random_context,
    random_ids,
    same_adapters,
)
from transformers import PreTrainedTokenizerFast

from gakernels import Adapter, FormatError, GenerativeAdapter, InputError


def test_a_loaded_adapter_is_the_same_bit_by_bit(tmp_path: Path) -> None:
    model, ids = make_model(), random_ids(2, 7)
    adapter = model.adapt([random_context(20)])[0]
    adapter.save(tmp_path / "adapter.safetensors")
    loaded = Adapter.load(tmp_path / "adapter.safetensors")
    assert same_adapters(loaded, adapter)
    assert (loaded.rank, loaded.numbers(), loaded.tokens_seen) == (4, 3 * 4 * (32 + 32 + 48 + 32), 20)
    assert sorted(loaded.target_modules) == ["down_proj", "o_proj"]
    with model.adapted(adapter):
        expected = logits_of(model.base, ids)
    with model.adapted(loaded):
        assert torch.equal(logits_of(model.base, ids), expected)


def test_an_adapter_in_another_dtype_keeps_what_it_is(tmp_path: Path) -> None:
    adapter = make_model().adapt([random_context(20)])[0]
    half = adapter.to(dtype=torch.bfloat16)
    half.save(tmp_path / "half.safetensors")
    assert same_adapters(Adapter.load(tmp_path / "half.safetensors"), half)
    assert half._description() == adapter._description()
    for name in adapter.lora_a:
        assert half.lora_a[name].dtype == torch.bfloat16
        assert (half.delta(name) - adapter.delta(name)).norm() < 0.02 * adapter.delta(name).norm()


def test_an_adapter_of_a_batch_does_not_keep_the_memory_of_the_others() -> None:
    for adapter in make_model().adapt([random_context(20) for _ in range(3)]):
        for factor in [*adapter.lora_a.values(), *adapter.lora_b.values()]:
            assert factor.untyped_storage().nbytes() == factor.numel() * factor.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_generator_makes_the_same_adapters(tmp_path: Path, dtype: torch.dtype) -> None:
    model, context = make_model(base_dtype=dtype, norm="polar", damping=2e-3, layers=(0, 2)), random_context(20)
    model.save_pretrained(tmp_path)
    loaded = GenerativeAdapter.from_pretrained(tmp_path, plain_copy(model))
    assert loaded.config == model.config
    assert same_adapters(loaded.adapt([context])[0], model.adapt([context])[0])


def test_a_generator_finds_its_base_model_and_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    model.base.save_pretrained(tmp_path / "somewhere" / "base")
    tokenizer.save_pretrained(tmp_path / "somewhere" / "base")
    model.save_pretrained(tmp_path / "somewhere", base_name="base")  # relative to the generator
    (tmp_path / "somewhere").rename(tmp_path / "elsewhere")
    loaded = GenerativeAdapter.from_pretrained(tmp_path / "elsewhere")
    expected = model.adapt([[1, 5, 9, 5]])[0]
    found = loaded.adapt(["w5 w9 w5"])[0]
    assert all(torch.equal(found.lora_b[name], expected.lora_b[name]) for name in expected.lora_b)


def test_a_base_model_without_a_tokenizer_loads_for_token_ids(tmp_path: Path) -> None:
    model, context = make_model(), random_context(9)
    model.base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path, base_name="base")
    loaded = GenerativeAdapter.from_pretrained(tmp_path)
    assert loaded.tokenizer is None
    assert torch.equal(*(list(one.adapt([context])[0].lora_b.values())[-1] for one in (loaded, model)))


def test_a_missing_base_model_is_named(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, base_name=str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"base model '.*gone' can't be loaded"):
        GenerativeAdapter.from_pretrained(tmp_path)


def test_the_wrong_base_is_refused_and_left_alone(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    base, ids = make_base(), random_ids(1, 5)
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(FormatError, match=r"base must be the model that .*generator\.safetensors was trained for"):
        GenerativeAdapter.from_pretrained(tmp_path, base)
    assert [type(module) for module in base.modules()] == kinds
    GenerativeAdapter(base, make_config())
    logits_of(base, ids)


def test_tensors_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    model = make_model()
    before = model.generator_fingerprint()
    good = {name: torch.zeros_like(tensor) for name, tensor in model.generator_tensors().items()}
    last = list(good)[-1]
    for wrong in (
        {name: tensor for name, tensor in good.items() if name != last},
        {**good, "another": torch.zeros(1)},
        {**good, last: torch.zeros(3, 3)},
    ):
        with pytest.raises(FormatError, match=r"here\.safetensors does not fit this generator: "):
            model.load_generator_tensors(wrong, "here.safetensors")
    assert model.generator_fingerprint() == before


def test_an_adapter_for_another_base_or_other_layers_is_refused() -> None:
    model, ids = make_model(), random_ids(1, 6)
    plain = logits_of(model.base, ids)
    foreign = make_model().adapt([random_context(9)])[0]
    other_layers = make_trained(GenerativeAdapter(plain_copy(model), make_config(linears=("o_proj",))))
    for adapter, message in (
        (foreign, foreign.base_fingerprint),
        (other_layers.adapt([random_context(9)])[0], "other linear layers"),
    ):
        with pytest.raises(FormatError, match=message), model.adapted(adapter):
            pass
        with pytest.raises(FormatError, match=message):
            model.merge(adapter)
    assert torch.equal(logits_of(model.base, ids), plain)


def test_an_adapter_of_other_sizes_is_refused() -> None:
    model = make_model()
    adapter = model.adapt([random_context(9)])[0]
    name = model.adapted_names[1]
    for side, factor in (("lora_a", torch.zeros(4, 7)), ("lora_b", torch.zeros(7, 4))):
        other = replace(adapter, **{side: {**getattr(adapter, side), name: factor}})
        with pytest.raises(FormatError, match=rf"does not have the sizes of {name}"), model.adapted(other):
            pass
        with pytest.raises(FormatError, match=rf"does not have the sizes of {name}"):
            model.merge(other)


def test_an_adapter_of_another_generator_of_the_same_base_can_be_used() -> None:
    model, ids = make_model(), random_ids(1, 6)
    other = make_trained(GenerativeAdapter(plain_copy(model), make_config(rank=7, seed=3)))
    adapter = other.adapt([random_context(9)])[0]
    with other.adapted(adapter):
        expected = logits_of(other.base, ids)
    with model.adapted(adapter):
        assert torch.equal(logits_of(model.base, ids), expected)


def test_files_are_readable_by_whoever_may_read_new_files(tmp_path: Path) -> None:
    make_model().adapt([random_context(9)])[0].save(tmp_path / "adapter.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "adapter.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
