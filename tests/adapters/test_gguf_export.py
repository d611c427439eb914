"""The GGUF LoRA file: read by the gguf package, and by llama.cpp where it is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, make_model, make_trained, random_context, random_ids
from transformers import PreTrainedModel

from gakernels import Adapter, GenerativeAdapter, GeneratorConfig, InputError
from studies.model_families import adaptable
from studies.tiny_models import make_base

gguf = pytest.importorskip("gguf")
newer_gguf = pytest.mark.skipif(not hasattr(gguf.MODEL_ARCH, "QWEN3NEXT"), reason="this gguf knows fewer architectures")

# Family: architecture in llama.cpp, and llama.cpp's names of the layers that FAMILIES adapts.
ARCHITECTURES = {
    "llama": ("llama", {"attn_output", "ffn_down"}),
    "llama_bias": ("llama", {"attn_output", "ffn_down"}),
    "mistral": ("llama", {"attn_output", "ffn_down"}),
    "qwen2": ("qwen2", {"attn_q", "attn_v", "attn_output"}),
    "qwen3": ("qwen3", {"attn_output", "ffn_gate"}),
    "gemma": ("gemma", {"attn_output", "ffn_down"}),
    "gemma2": ("gemma2", {"attn_output", "ffn_down"}),
    "gemma3": ("gemma3", {"attn_output", "ffn_down"}),
    "phi3": ("phi3", {"attn_qkv", "attn_output", "ffn_down"}),
    "gpt_neox": ("gptneox", {"attn_output", "ffn_down"}),
    "cohere": ("command-r", {"attn_output"}),
    "granite": ("granite", {"attn_output"}),
    "olmo2": ("olmo2", {"attn_output"}),
    "starcoder2": ("starcoder2", {"attn_output", "ffn_down"}),
    "mixtral": ("llama", {"attn_output"}),
}
HF_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and tensors, in float32, of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors
    }
    return fields, tensors


def own_name(name: str) -> str:
    """The layer of a Llama that a tensor of the file belongs to."""
    layer, part = name.split(".")[1:3]
    short = next(short for short, long in HF_NAMES.items() if long == part)
    return f"model.layers.{layer}.{'self_attn' if part.startswith('attn') else 'mlp'}.{short}"


def test_every_family_has_a_case_here() -> None:
    assert set(FAMILIES) - set(ARCHITECTURES) == {"llama_tied"}  # a Llama like the others


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_metadata_and_shapes_are_those_of_llama_cpp(tmp_path: Path, family: str) -> None:
    model = make_model(family)
    adapter = model.adapt([random_context(20)])[0]
    adapter.save_gguf(tmp_path / "adapter.gguf")
    fields, tensors = read(tmp_path / "adapter.gguf")
    architecture, layers = ARCHITECTURES[family]
    assert fields["general.architecture"] == architecture
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 4.0)
    assert fields["gakernels.base_fingerprint"] == adapter.base_fingerprint
    expected = {f"blk.{i}.{layer}.weight.lora_{x}" for i in range(3) for layer in layers for x in "ab"}
    assert set(tensors) == expected
    names = {name.rpartition(".lora_")[0] for name in tensors}
    shapes = sorted((tensors[f"{name}.lora_b"].shape[0], tensors[f"{name}.lora_a"].shape[1]) for name in names)
    assert shapes == sorted(adapter.delta(name).shape for name in adapter.lora_a)
    assert all(tensors[f"{name}.lora_a"].shape[0] == tensors[f"{name}.lora_b"].shape[1] == 4 for name in names)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_alpha_over_rank_times_the_product_is_the_delta(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    adapter = make_model(linears=("v_proj", "o_proj", "up_proj"), scale=0.3).adapt([random_context(20)])[0]
    adapter.to(dtype=dtype).save_gguf(tmp_path / "adapter.gguf")
    fields, tensors = read(tmp_path / "adapter.gguf")
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        a, b = (tensors[f"{name}.lora_{letter}"].double() for letter in "ab")
        product = fields["adapter.lora.alpha"] / b.shape[1] * (b @ a)
        expected = adapter.delta(own_name(name)).double()
        assert (product - expected).norm() <= tolerance * expected.norm()
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert kinds == {str(dtype).removeprefix("torch.").replace("float", "F").replace("bF", "BF")}


def llama_cpp_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows i and i + n/2 of a head of n rows become its rows 2i and 2i + 1."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


@pytest.mark.parametrize(("family", "changed"), [("llama", True), ("granite", True), ("qwen2", False)])
def test_rows_of_queries_and_keys_are_in_the_order_of_llama_cpp(tmp_path: Path, family: str, changed: bool) -> None:
    adapter = make_model(family, linears=("q_proj", "k_proj"), scale=1.0).adapt([random_context(20)])[0]
    adapter.save_gguf(tmp_path / "adapter.gguf")
    for name, tensor in read(tmp_path / "adapter.gguf")[1].items():
        if name.endswith(".lora_b"):
            own = adapter.lora_b[own_name(name)]
            heads = 4 if "attn_q" in name else 2
            assert torch.equal(tensor, llama_cpp_order(own, heads) if changed else own)


def adapter_of(family: str, linears: tuple[str, ...] = ()) -> Adapter:
    """An adapter of all linear layers of a tiny model from `studies`, or of some."""
    base = make_base(family)
    config = GeneratorConfig(linears=linears or tuple(adaptable(base)), state_size=16, rank=4, chunk_size=6)
    return make_trained(GenerativeAdapter(base, config)).adapt([random_context(9)])[0]


# Family: architecture in llama.cpp, and its names of the layers of a block. All as its converter names them.
ATTENTION = {"attn_q", "attn_k", "attn_v", "attn_output"}
MLP = {"ffn_gate", "ffn_up", "ffn_down"}
SHARED = {"ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}
MORE_ARCHITECTURES = {
    "bloom": ("bloom", {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    "falcon": ("falcon", {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    "gemma3": ("gemma3", ATTENTION | MLP),
    "glm4": ("glm4", ATTENTION | {"ffn_up", "ffn_down"}),
    "gpt2": ("gpt2", {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    "gpt_neox": ("gptneox", {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    "gpt_oss": ("gpt-oss", ATTENTION),
    "nemotron": ("nemotron", ATTENTION | {"ffn_up", "ffn_down"}),
    "olmo": ("olmo", ATTENTION | MLP),
    "qwen2_5_vl": ("qwen2vl", ATTENTION | MLP),
    "qwen2_moe": ("qwen2moe", ATTENTION | SHARED | {"ffn_gate_inp_shexp"}),
    "qwen3_moe": ("qwen3moe", ATTENTION),
    "smollm3": ("smollm3", ATTENTION | MLP),
    "stablelm": ("stablelm", ATTENTION | MLP),
}


@newer_gguf
@pytest.mark.parametrize("family", MORE_ARCHITECTURES)
def test_more_architectures_have_the_names_and_shapes_of_llama_cpp(tmp_path: Path, family: str) -> None:
    adapter = adapter_of(family)
    adapter.save_gguf(tmp_path / "adapter.gguf")
    fields, tensors = read(tmp_path / "adapter.gguf")
    architecture, layers = MORE_ARCHITECTURES[family]
    assert fields["general.architecture"] == architecture
    assert {name.split(".")[2] for name in tensors} == layers
    assert len(tensors) == 2 * len(adapter.lora_a)
    names = {name.rpartition(".lora_")[0] for name in tensors}
    shapes = sorted((len(tensors[f"{name}.lora_b"]), tensors[f"{name}.lora_a"].shape[1]) for name in names)
    assert shapes == sorted(adapter.delta(name).shape for name in adapter.lora_a)


@newer_gguf
def test_kinds_of_layers_are_known_by_name(tmp_path: Path) -> None:
    kinds = {
        "deepseek_v3": ({"kv_a_proj_with_mqa", "q_b_proj", "o_proj"}, {"attn_kv_a_mqa", "attn_q_b", "attn_output"}),
        "jamba": ({"mamba.x_proj", "q_proj"}, {"ssm_x", "attn_q"}),
        "lfm2": ({"out_proj", "w1"}, {"attn_output", "ffn_gate"}),
        "qwen3_next": ({"self_attn.o_proj", "shared_expert_gate"}, {"attn_output", "ffn_gate_inp_shexp"}),
    }
    for family, (linears, expected) in kinds.items():
        adapter_of(family, tuple(linears)).save_gguf(tmp_path / "adapter.gguf")
        assert {name.split(".")[2] for name in read(tmp_path / "adapter.gguf")[1]} == expected


@pytest.mark.parametrize(("family", "groups"), [("bloom", 4), ("gpt_neox", 4), ("falcon", 1)])
def test_fused_queries_keys_and_values_are_sorted_as_llama_cpp_has_them(
    tmp_path: Path, family: str, groups: int
) -> None:
    adapter = adapter_of(family, ("query_key_value",))
    adapter.save_gguf(tmp_path / "adapter.gguf")
    heads, size = 4, 8
    each = heads // groups + 2  # in a group: its queries, a key and a value
    queries = [group * each + query for group in range(groups) for query in range(heads // groups)]
    keys, values = ([group * each + each - back for group in range(groups)] for back in (2, 1))
    rows = [head * size + row for head in [*queries, *keys, *values] for row in range(size)]
    tensors = read(tmp_path / "adapter.gguf")[1]
    for number, (name, lora_b) in enumerate(adapter.lora_b.items()):
        assert len(lora_b) == len(rows)
        assert torch.equal(tensors[f"blk.{number}.attn_qkv.weight.lora_b"], (lora_b * adapter.scale)[rows])
        assert torch.equal(tensors[f"blk.{number}.attn_qkv.weight.lora_a"], adapter.lora_a[name])


@newer_gguf
@pytest.mark.parametrize(
    ("family", "linear"),
    [
        ("deepseek_v3", "kv_b_proj"),
        ("falcon_h1", "mamba.in_proj"),
        ("granitemoehybrid", "self_attn.q_proj"),
        ("qwen3_next", "linear_attn.out_proj"),
    ],
)
def test_layers_that_llama_cpp_has_in_another_form_are_refused(tmp_path: Path, family: str, linear: str) -> None:
    with pytest.raises(InputError, match=rf"does not know llama\.cpp's form of model\.layers\.\d\.\S*{linear} in a"):
        adapter_of(family, (linear,)).save_gguf(tmp_path / "adapter.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gptj", "bitnet", "bart"])
def test_models_that_llama_cpp_does_not_convert_are_refused(tmp_path: Path, family: str) -> None:
    with pytest.raises(InputError, match=rf"GGUF export \(gguf \S+\) does not know {family} models"):
        adapter_of(family).save_gguf(tmp_path / "adapter.gguf")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    adapter = make_model().adapt([random_context(9)])[0]
    for config, message in (
        ({}, "does not name its base model"),
        ({"model_type": "flux"}, "does not know flux models"),
    ):
        other = Adapter(**{**vars(adapter), "base_config": config})
        with pytest.raises(InputError, match=message):
            other.save_gguf(path)
    queries = make_model(linears=("q_proj",)).adapt([random_context(9)])[0]
    other = Adapter(**{**vars(queries), "base_config": {**queries.base_config, "num_attention_heads": 5}})
    with pytest.raises(InputError, match="must have rows for 5 heads of an even size, but it has 32"):
        other.save_gguf(path)
    odd = Adapter(**{**vars(adapter), **{f"lora_{x}": {"model.tower.o_proj": torch.ones(2, 2)} for x in "ab"}})
    with pytest.raises(InputError, match=r"form of model\.tower\.o_proj in a llama model"):
        odd.save_gguf(path)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'gakernels\[gguf\]'"):
        make_model().adapt([random_context(9)])[0].save_gguf(tmp_path / "adapter.gguf")


def write_base(base: PreTrainedModel, path: Path) -> None:
    """A tiny Llama or Qwen2 as llama.cpp reads it, with an invented tokenizer."""
    config = base.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", *(f"w{i}" for i in range(4, config.vocab_size))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (len(tokens) - 4)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = {**HF_NAMES, "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in base.state_dict().items():
        stem, _, kind = name.rpartition(".")
        last = stem.rpartition(".")[2]
        target = fixed.get(stem) or f"blk.{stem.split('.')[2]}.{names[last]}"
        interleaved = config.model_type == "llama" and last in heads
        writer.add_tensor(f"{target}.{kind}", (llama_cpp_order(tensor, heads[last]) if interleaved else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_llama_cpp_computes_the_same_distribution(tmp_path: Path, family: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    model = make_model(family, linears=linears, scale=0.3)
    adapter, ids = model.adapt([random_context(20)])[0], random_ids(1, 12)
    write_base(model.base, tmp_path / "base.gguf")
    adapter.save_gguf(tmp_path / "adapter.gguf")

    def probabilities(**options: Any) -> torch.Tensor:
        exact = {"type_k": 0, "type_v": 0}  # keys and values in float32
        path = str(tmp_path / "base.gguf")
        llama = llama_cpp.Llama(path, n_ctx=64, n_threads=1, logits_all=True, verbose=False, **exact, **options)
        llama.eval(ids[0].tolist())
        logits = torch.tensor(llama.scores[: ids.shape[1]]).double()
        llama.close()
        return logits.softmax(-1)

    with torch.no_grad():
        plain = model.base(input_ids=ids).logits[0].double().softmax(-1)
        with model.adapted(adapter):
            expected = model.base(input_ids=ids).logits[0].double().softmax(-1)
    assert (probabilities() - plain).abs().max() < 1e-6
    found = probabilities(lora_path=str(tmp_path / "adapter.gguf"))
    assert (found - expected).abs().max() < 1e-6
    assert (expected - plain).abs().max() > 3e-3
