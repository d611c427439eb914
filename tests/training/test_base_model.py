"""Loading the base model of a recipe."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from invented import make_tokenizer
from tiny import make_base
from transformers import LlamaConfig, LlamaForCausalLM

from gakernels import InputError
from gakernels.training.base_model import BaseConfig, base_dtype, load_base_model
from gakernels.training.instruction.recipe import InstructionDataConfig
from gakernels.training.instruction.tuning_data import load_tuning_data
from gakernels.training.pretraining_data import DataConfig, HeldOutSize, load_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_base().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_without_a_dtype_it_has_its_own(tmp_path: Path, dtype: str) -> None:
    make_base().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    config = BaseConfig(str(tmp_path))
    assert load_base_model(config, "cpu")[0].dtype == base_dtype(config) == getattr(torch, dtype)
    assert base_dtype(BaseConfig(str(tmp_path), dtype="float32")) == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_has_the_dtype_of_the_recipe(folder: Path, dtype: str) -> None:
    base, tokenizer = load_base_model(BaseConfig(str(folder), dtype=dtype), "cpu")
    assert base.dtype == getattr(torch, dtype)
    assert tokenizer is not None
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_weights_are_quantised_as_the_recipe_says(folder: Path) -> None:
    base, _ = load_base_model(BaseConfig(str(folder), dtype="bfloat16", quantization="fp8"), "cpu")
    assert type(base.get_submodule("model.layers.0.self_attn.o_proj")).__name__ == "Float8Linear"


def test_added_tokens_that_the_model_does_not_know_count_only_in_texts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, loaded = load_base_model(BaseConfig(str(tmp_path / "base")), "cpu")
    assert loaded is not None
    assert max(loaded.get_vocab().values()) == 66 > base.get_input_embeddings().num_embeddings
    texts = tmp_path / "a.jsonl"
    rows = [{"text": "w5 w6 " * 40, "context": f"w9 w{n}", "question": "w7", "answer": "w8"} for n in range(10, 20)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read_texts() -> None:
        load_data(DataConfig(str(texts), cache=tmp_path / "cache"), loaded, 64, 8, HeldOutSize(2, 4), progress=False)

    def read_questions() -> None:
        load_tuning_data(InstructionDataConfig(str(texts)), loaded, 64, 30, 2, progress=False)

    read_texts()
    read_questions()
    rows[6] = {"text": "w5 <video> w6", "context": "w4", "question": "<image> w7", "answer": "w8"}
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(InputError, match=r"document 7 of .*a\.jsonl has the token '<video>' \(65\), .* has 64 rows"):
        read_texts()
    with pytest.raises(InputError, match=r"context 7 of .*a\.jsonl has the token '<image>' \(64\), .* has 64 rows"):
        read_questions()


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"must be that of its model, but it gives token ids up to 63, .* has 20 rows"):
        load_base_model(BaseConfig(str(tmp_path)), "cpu")
