"""Loading the base model of a recipe."""

from pathlib import Path

import pytest
import torch
from invented import make_tokenizer
from tiny import make_base
from transformers import LlamaConfig, LlamaForCausalLM

from gakernels import InputError
from gakernels.training.base_model import BaseConfig, load_base_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_base().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_has_the_dtype_of_the_recipe(folder: Path, dtype: str) -> None:
    base, tokenizer = load_base_model(BaseConfig(str(folder), dtype=dtype), "cpu")
    assert base.dtype == getattr(torch, dtype)
    assert tokenizer is not None
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_weights_are_quantised_as_the_recipe_says(folder: Path) -> None:
    base, _ = load_base_model(BaseConfig(str(folder), dtype="bfloat16", quantization="fp8"), "cpu")
    assert type(base.get_submodule("model.layers.0.self_attn.o_proj")).__name__ == "Float8Linear"


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"must be that of its model, but it gives token ids up to 63, .* has 20 rows"):
        load_base_model(BaseConfig(str(tmp_path)), "cpu")
