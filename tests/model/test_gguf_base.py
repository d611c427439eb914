"""A base model that is a GGUF file, as llama.cpp has them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from optional_packages import reads_gguf
from tiny import logits_of, make_config, make_trained, random_ids
from transformers import LlamaConfig, LlamaForCausalLM

from gakernels import GenerativeAdapter, InputError
from gakernels.model import load_base
from gakernels.training.base_model import BaseConfig, base_shape

gguf = pytest.importorskip("gguf")


pytestmark = pytest.mark.skipif(not reads_gguf(), reason="this transformers can't tell the version of this gguf")

WORDS = ["<unk>", "<s>", "</s>", *(chr(ord("a") + number) for number in range(26)), "\u0120", "ab"]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k in llama.cpp's order, which pairs rows 2i and 2i + 1 of a head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: LlamaForCausalLM, path: Path, kind: Any = gguf.GGMLQuantizationType.F32) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(WORDS))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        count = next((count for part, count in heads.items() if part in name), None)
        numbers = tensor if count is None else rotated(tensor, count)
        own = kind if numbers.dim() > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(numbers.contiguous().numpy(), own)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_it_is_the_model_that_was_written(tmp_path: Path) -> None:
    original = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    write_gguf(original, tmp_path / "base.gguf")
    base, tokenizer = load_base(str(tmp_path / "base.gguf"))
    ids = random_ids(2, 7) % len(WORDS)
    torch.testing.assert_close(logits_of(base, ids), logits_of(original, ids))
    assert tokenizer is not None
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == [WORDS.index("ab"), WORDS.index("c")]


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4), ("F16", 11), ("BF16", 8)])
def test_its_weights_are_dequantised(tmp_path: Path, kind: str, bits: int) -> None:
    original = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    write_gguf(original, tmp_path / "base.gguf", getattr(gguf.GGMLQuantizationType, kind))
    base, _ = load_base(str(tmp_path / "base.gguf"))
    assert getattr(base.config, "quantization_config", None) is None
    weights, found = original.state_dict(), base.state_dict()
    errors = [float((found[name] - weight).abs().max() / weight.abs().max()) for name, weight in weights.items()]
    assert 0 < max(errors) < 2.0 ** (2 - bits)
    model = make_trained(GenerativeAdapter(base, make_config()))
    adapter, ids = model.adapt([3, 4, 5, 6, 7]), random_ids(2, 7) % len(WORDS)
    with model.adapted(adapter):
        adapted = logits_of(base, ids)
    model.merge(adapter)  # not refused as quantised
    torch.testing.assert_close(logits_of(base, ids), adapted, rtol=1e-4, atol=1e-4)


def test_its_shape_is_read_without_its_weights(tmp_path: Path) -> None:
    original = LlamaForCausalLM(LlamaConfig(**SIZES))
    write_gguf(original, tmp_path / "base.gguf")
    shape = base_shape(BaseConfig(str(tmp_path / "base.gguf")))
    assert shape.parameters == original.num_parameters()


def test_a_generator_names_it_and_finds_it_again(tmp_path: Path) -> None:
    write_gguf(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "base.gguf")
    base, tokenizer = load_base(str(tmp_path / "base.gguf"))
    model = make_trained(GenerativeAdapter(base, make_config(), tokenizer))
    model.save_pretrained(tmp_path / "generator")
    again = GenerativeAdapter.from_pretrained(tmp_path / "generator")
    context = [3, 4, 5, 6, 7]
    assert torch.equal(*(next(iter(made.adapt(context).lora_b.values())) for made in (model, again)))
    model.save_merged(model.adapt(context), tmp_path / "merged")  # not refused as quantised
    assert (tmp_path / "merged" / "config.json").is_file()


def test_one_whose_tokenizer_is_unusable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_merges", lambda self, merges: None)
    write_gguf(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "base.gguf")
    with pytest.raises(InputError, match=r"the tokenizer of '.*base\.gguf' can't be loaded"):
        load_base(str(tmp_path / "base.gguf"))


def test_a_damaged_one_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(InputError, match=r"base model '.*base\.gguf' can't be loaded"):
        load_base(str(tmp_path / "base.gguf"))
