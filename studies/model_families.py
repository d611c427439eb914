"""Which families of language models of the installed transformers can be adapted: a markdown table.

    python -m studies.model_families            # all of them: docs/model_families.md
    python -m studies.model_families gpt2 opt   # some

Each is a tiny random model from its configuration class. All linear layers that its decoder layers call are adapted,
and five things are checked, in float32:

    start     the adapter at the start of training changes no logit
    adapters  each row of a batch, with an adapter of its own, gets the logits of a copy of the base with W + Delta W
    merged    so does the base with the adapter merged into it, which is the old one again afterwards
    PEFT      so does PEFT with the folder that was written for it
    files     a saved generator makes the same adapter
    padding   with prompts padded on the left, each row is continued as by its copy with W + Delta W
"""

import argparse
import copy
import inspect
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from gakernels import Adapter, GenerativeAdapter, GeneratorConfig, InputError
from gakernels.errors import first_line
from gakernels.model.attachment import decoder_layers
from gakernels.model.base_model import auto_class
from gakernels.nn.adapted_quantized_linear import is_linear

VOCABULARY = 64
LARGEST = 3_000_000  # parameters
TOLERANCE = 1e-4
# Models of text and images whose text decoder is used; the rest of them is in the mapping of causal models.
VISION = ("mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_NAMES = {  # settings of transformers' configurations, by their tiny value
    1: "n_group topk_group num_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_experts_per_tok moe_topk num_kv_heads linear_num_key_heads index_n_heads depth "
    "num_key_value_heads swa_num_key_value_heads num_global_key_value_heads moe_k n_shared_experts num_blocks num_query_groups",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads attention_heads rotary_dim num_experts n_routed_experts "
    "num_local_experts moe_num_experts linear_num_value_heads mamba_n_heads mamba_num_heads time_step_rank "
    "swa_num_attention_heads temporal_patch_size patch_size",
    5: "sliding_window attention_window_size sliding_window_size",
    8: "head_dim qk_rope_head_dim v_head_dim kv_lora_rank qk_nope_head_dim q_lora_rank linear_key_head_dim "
    "linear_value_head_dim index_head_dim mamba_d_state mamba_chunk_size chunk_size state_size hidden_size_per_layer_"
    "input global_head_dim query_pre_attn_scalar laurel_rank mamba_head_dim ssm_state_size image_size "
    "swa_head_dim linear_head_dim attention_head_dim kv_channels o_lora_rank mamba_dt_rank adapter_rank dim_head",
    16: "mamba_d_head qk_head_dim moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size router_hidden_size",
    32: "hidden_size d_model n_embd embedding_size word_embed_proj_dim emb_dim lru_width dim_model_base "
    "out_hidden_size input_embedding_size output_embedding_size attention_hidden_size embedding_dim",
    48: "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim n_inner ffn_hidden_size dense_intermediate_size "
    "intermediate_size_mlp mlp_dim dff feed_forward_size",
    64: "vocab_size index_topk vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx max_seq_len original_max_position_embeddings",
}
SMALL = {name: value for value, names in _NAMES.items() for name in names.split()}
SMALL |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_DECODER = {"is_decoder": True}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
# What a family needs besides. Under the name of an inner configuration: the family of that, or settings for it.
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert prophetnet rembert roberta "
        "roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl".split(),
        _DECODER,
    ),
    "bailing_hybrid": {"num_hidden_layers": 4},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "fuyu": {"text_config": "persimmon"},
    "gemma3": {"text_config": "gemma3_text", "vision_config": "siglip_vision_model"},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 4},
    "mamba2": {"head_dim": 16},
    "mistral3": {"text_config": "mistral", "vision_config": "pixtral"},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}, "vision_config": {"embed_dim": 32, "num_heads": 4}},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        **_DECODER,
        "attn_layers": ["local", "local"],
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [8, 16],
        "local_attn_chunk_length": 16,
    },
    "roc_bert": {**_DECODER, "shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(
        "kimi_linear qwen3_5_moe_text qwen3_5_text qwen3_next".split(),
        {"layer_types": ["linear_attention", "full_attention"]},
    ),
    **dict.fromkeys("qwen3_5 qwen3_5_moe".split(), {"text_config": {"layer_types": ["linear_attention", "full_attention"]}}),
}


def families() -> list[str]:
    """The model types of transformers' mapping of causal language models, and those of `VISION`."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VISION})


def tiny_config(kind: str) -> PreTrainedConfig:
    """A configuration with tiny sizes."""
    return _tiny(CONFIG_MAPPING[kind], SPECIAL.get(kind, {}))


def _tiny(config: type[PreTrainedConfig], special: Mapping[str, Any]) -> PreTrainedConfig:
    known = set(config.attribute_map)
    for parent in config.__mro__:
        known |= set(inspect.get_annotations(parent))
        known |= set(inspect.signature(parent.__init__).parameters)
    settings: dict[str, Any] = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known:  # compressed keys and values have as many heads as queries
        settings["num_key_value_heads"] = SMALL["num_attention_heads"]
    settings |= special
    for name, inner in config.sub_configs.items():
        given = special.get(name, {})
        if isinstance(given, str):
            settings[name] = tiny_config(given)
        elif issubclass(inner, PreTrainedConfig):
            settings[name] = _tiny(inner, given)
    return config(**settings)


def make_base(kind: str) -> PreTrainedModel:
    """A tiny random model whose norms and biases are no longer ones and zeros."""
    config = tiny_config(kind)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto_class(kind).from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters with these settings")
    base: PreTrainedModel = auto_class(kind).from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return base


class Difference(AssertionError):
    """Two results that should be the same are not."""


def examine(kind: str) -> str:
    """What happens to a family: "works", with remarks, or what stops it."""
    try:
        base = make_base(kind)
        _logits(base, _random(2, 7))
    except Exception as error:
        return f"not tried: no tiny model of random numbers runs ({first_line(error)})"
    try:
        return "works" + "".join(f"; {remark}" for remark in check(base))
    except Difference as error:
        return f"wrong: {error}"
    except InputError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {first_line(error)}"


def check(base: PreTrainedModel) -> list[str]:
    """Make all the checks; returns remarks.

    Raises:
        Difference: one of them failed.
        InputError: the base is refused.
    """
    ids, plain = _random(2, 7), copy.deepcopy(base)
    logits = _logits(base, ids)
    model = _attach(base, adaptable(plain) or ["o_proj"])
    with model.adapted(_adapters(model)):
        _same(_logits(base, ids), logits, "the adapter at the start changes the logits")
    _train(model)
    _check_causal(plain, ids, logits)
    adapters = _adapters(model)
    with model.adapted(adapters):
        found = _logits(base, ids)
    if (found - logits).abs().max() < 1e-3:
        raise Difference("an adapter changes nothing")
    merged = [_merged(plain, adapter) for adapter in adapters]
    wanted = torch.cat([_logits(copy_, ids[row : row + 1]) for row, copy_ in enumerate(merged)])
    _same(found, wanted, "rows with adapters differ from a copy with W + Delta W")
    remarks = [*_check_merge(model, adapters[0], ids, wanted, logits), *_check_peft(plain, ids)]
    _check_files(model, plain)
    return [*remarks, *_check_padding(model, plain, adapters, merged)]


def adaptable(base: PreTrainedModel) -> list[str]:
    """Names, within their decoder layer, of the linear layers that are called and return one tensor."""
    called: list[str] = []
    handles = []
    for layer in decoder_layers(base)[1]:
        for name, module in layer.named_modules():
            if is_linear(module):

                def note(_: nn.Module, args: object, output: object, name: str = name) -> None:
                    if isinstance(output, Tensor):
                        called.append(name)

                handles.append(module.register_forward_hook(note))
    _logits(base, _random(2, 7))
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(called))


def _random(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)


@torch.no_grad()
def _logits(base: Any, ids: Tensor) -> Tensor:
    logits: Tensor = base(input_ids=ids, use_cache=False).logits
    return logits


def _same(found: Tensor, wanted: Tensor, what: str) -> None:
    error = (found - wanted).abs().max() / wanted.abs().max()
    if not error < TOLERANCE:
        raise Difference(f"{what} (relative error {float(error):.1g})")


def _attach(base: PreTrainedModel, linears: Sequence[str]) -> GenerativeAdapter:
    config = GeneratorConfig(linears=tuple(linears), state_size=16, rank=4, chunk_size=6, scale=0.5)
    return GenerativeAdapter(base, config)


def _train(model: GenerativeAdapter) -> None:
    """Random output maps in place of zeros."""
    with torch.no_grad():
        for name in model.adapted_names:
            model.generator(name).output_map.normal_(std=0.5)


def _adapters(model: GenerativeAdapter) -> list[Adapter]:
    return model.adapt([_random(length).tolist() for length in (15, 9)])


def _check_causal(base: PreTrainedModel, ids: Tensor, logits: Tensor) -> None:
    other = torch.cat([ids[:, :-1], (ids[:, -1:] - 2) % (VOCABULARY - 3) + 3], dim=1)
    _same(_logits(base, other)[:, :-1], logits[:, :-1], "a token changes the logits of those before it")


@torch.no_grad()
def _merged(plain: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A copy with W + Delta W, by hand."""
    base = copy.deepcopy(plain)
    for name in adapter.lora_a:
        linear, delta = base.get_submodule(name), adapter.delta(name)
        linear.weight.add_(delta.T if isinstance(linear, Conv1D) else delta)
    return base


def _check_merge(
    model: GenerativeAdapter, adapter: Adapter, ids: Tensor, wanted: Tensor, logits: Tensor
) -> Iterator[str]:
    try:
        model.merge(adapter)
    except InputError:
        yield "an adapter can't be merged"
        return
    _same(_logits(model.base, ids[:1]), wanted[:1], "merged and unmerged logits differ")
    model.unmerge()
    if not torch.equal(_logits(model.base, ids), logits):
        raise Difference("the base is not the old one after unmerge()")


def _check_peft(plain: PreTrainedModel, ids: Tensor) -> Iterator[str]:
    names = adaptable(plain)
    moved = [name for name in names if not _in_peft(plain, name)]
    if moved:
        yield f"PEFT can't load {', '.join(sorted({name.rpartition('.')[2] for name in moved}))}"
    model = _attach(copy.deepcopy(plain), [name for name in names if name not in moved])
    _train(model)
    adapter = _adapters(model)[0]
    with model.adapted(adapter):
        wanted = _logits(model.base, ids)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_peft(folder)
        other = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder)
    _same(_logits(other, ids), wanted, "PEFT's logits differ")


def _in_peft(base: PreTrainedModel, name: str) -> bool:
    """PEFT takes these names for those of experts that transformers 5 has fused, or of a layer of Mamba."""
    settings, last = str(base.config.to_dict()), name.rpartition(".")[2]
    moved = {"gate_proj", "up_proj", "down_proj"} if "experts" in settings else set()
    return last not in moved | ({"out_proj"} if "mamba" in settings else set())


def _check_files(model: GenerativeAdapter, plain: PreTrainedModel) -> None:
    context = _random(9).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = GenerativeAdapter.from_pretrained(folder, copy.deepcopy(plain))
        made, wanted = again.adapt(context), model.adapt(context)
        wanted.save(Path(folder) / "adapter.safetensors")
        loaded = Adapter.load(Path(folder) / "adapter.safetensors")
    for name in model.adapted_names:
        for other in (made, loaded):
            _same(other.lora_b[name], wanted.lora_b[name], "a saved generator or adapter differs")


def _check_padding(
    model: GenerativeAdapter, plain: PreTrainedModel, adapters: Sequence[Adapter], merged: Sequence[PreTrainedModel]
) -> Iterator[str]:
    short, ids = _random(1, 4), _random(2, 7)
    ids[1] = torch.cat([torch.zeros(3, dtype=torch.int64), short[0]])
    mask = (ids > 0).long()
    try:
        alone, padded = _continued(plain, short, torch.ones_like(short)), _continued(plain, ids, mask)
    except Exception as error:
        yield f"the base itself can't continue padded prompts ({type(error).__name__})"
        return
    if not torch.allclose(alone[0], padded[1], atol=1e-3):
        yield "the base itself continues a padded prompt differently"
    with model.adapted(adapters):
        found = _continued(model.base, ids, mask)
    wanted = torch.stack([_continued(base, ids, mask)[row] for row, base in enumerate(merged)])
    _same(found, wanted, "prompts padded on the left are continued differently")


def _continued(base: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits (rows, 4, vocabulary) of four more tokens."""
    output = base.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits, dim=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("families", nargs="*", help="model types; all if none is given")
    kinds = parser.parse_args(arguments).families or families()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print("| family | what happens |\n|---|---|")
    for kind in kinds:
        print(f"| `{kind}` | {examine(kind)} |", flush=True)


if __name__ == "__main__":
    main()
