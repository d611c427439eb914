"""Tiny random models of the families of language models in transformers, from their configuration classes."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gakernels.model.base_model import auto_class

VOCABULARY = 64
LARGEST = 3_000_000  # parameters
# Models of text and images whose text decoder is used; the rest of them is in the mapping of causal models.
VISION = ("mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_NAMES = {  # settings of transformers' configurations, by their tiny value
    1: "n_group topk_group num_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_experts_per_tok moe_topk num_kv_heads linear_num_key_heads index_n_heads depth "
    "num_key_value_heads swa_num_key_value_heads num_global_key_value_heads moe_k n_shared_experts "
    "num_blocks num_query_groups",
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
SMALL: dict[str, int | None] = {name: value for value, names in _NAMES.items() for name in names.split()}
SMALL |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_DECODER = {"is_decoder": True}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
# What a family needs besides. Under the name of an inner configuration: the family of that, or settings for it.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_hidden_layers": 4},
    "bamba": {"attn_layer_indices": [1]},
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": _DECODER,
    "camembert": _DECODER,
    "data2vec-text": _DECODER,
    "electra": _DECODER,
    "ernie": _DECODER,
    "falcon_h1": {"mamba_d_ssm": 64},
    "fuyu": {"text_config": "persimmon"},
    "gemma3": {"text_config": "gemma3_text", "vision_config": "siglip_vision_model"},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "got_ocr2": {"text_config": "qwen2", "vision_config": {"output_channels": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _HYBRID,
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "kimi_linear": _HYBRID,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 4},
    "mamba2": {"head_dim": 16},
    "megatron-bert": _DECODER,
    "mistral3": {"text_config": "mistral", "vision_config": "pixtral"},
    "prophetnet": _DECODER,
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_vl": {"text_config": _MROPE, "vision_config": {"embed_dim": 32, "num_heads": 4}},
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_moe": {"text_config": _HYBRID},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        **_DECODER,
        "attn_layers": ["local", "local"],
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [8, 16],
        "local_attn_chunk_length": 16,
    },
    "rembert": _DECODER,
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": {**_DECODER, "shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "roformer": _DECODER,
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
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
        known |= set(inspect.signature(parent).parameters)
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
