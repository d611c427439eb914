"""Tiny random base models, made from configurations: nothing is downloaded."""

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from gakernels import Adapter, GenerativeAdapter, GeneratorConfig

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
# Family: class of its configuration, settings beyond SIZES, linear layers to adapt.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("LlamaConfig", {}, ("o_proj", "down_proj")),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}, ("self_attn.o_proj",)),
    "llama_bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, ("o_proj", "down_proj")),
    "mistral": ("MistralConfig", {"sliding_window": 5}, ("o_proj", "down_proj")),
    "qwen2": ("Qwen2Config", {}, ("q_proj", "v_proj", "o_proj")),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, ("o_proj", "gate_proj")),
    "gemma": ("GemmaConfig", {"head_dim": 8}, ("o_proj", "down_proj")),
    "gemma2": (
        "Gemma2Config",
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "attn_implementation": "eager"},
        ("o_proj", "down_proj"),
    ),
    "gemma3": ("Gemma3TextConfig", GEMMA, ("o_proj", "down_proj")),
    "phi3": ("Phi3Config", {}, ("qkv_proj", "o_proj", "down_proj")),
    "gpt_neox": ("GPTNeoXConfig", {}, ("attention.dense", "dense_4h_to_h")),
    "cohere": ("CohereConfig", {"logit_scale": 0.3}, ("o_proj",)),
    "granite": ("GraniteConfig", {"logits_scaling": 7.0, "residual_multiplier": 0.5}, ("o_proj",)),
    "olmo2": ("Olmo2Config", {}, ("o_proj",)),
    "starcoder2": ("Starcoder2Config", {"use_bias": True}, ("o_proj", "c_proj")),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2}, ("o_proj",)),
}


def make_base(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose norms and biases are no longer ones and zeros."""
    class_name, settings, _ = FAMILIES[family]
    config = getattr(transformers, class_name)(**{**SIZES, **settings})
    base = AutoModelForCausalLM.from_config(config, attn_implementation=settings.get("attn_implementation")).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return base.to(dtype)


def make_config(family: str = "llama", **settings: Any) -> GeneratorConfig:
    linears = FAMILIES[family][2]
    return GeneratorConfig(
        **{"linears": linears, "state_size": 16, "rank": 4, "chunk_size": 6, "scale": 0.5, **settings}
    )


def make_model(
    family: str = "llama",
    base_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    trained: bool = True,
    **settings: Any,
) -> GenerativeAdapter:
    """Generators on a random base; if trained, with random output maps, so that adapters are not zero."""
    model = GenerativeAdapter(make_base(family, base_dtype), make_config(family, **settings), tokenizer, dtype)
    return make_trained(model) if trained else model


def make_trained(model: GenerativeAdapter) -> GenerativeAdapter:
    with torch.no_grad():
        for name in model.adapted_names:
            generator = model.generator(name)
            generator.output_map.normal_(std=0.5)
            generator.norm_weight.add_(0.2 * torch.randn_like(generator.norm_weight))
            if generator.static_lora_b is not None:
                generator.static_lora_b.normal_(std=0.5)
    return model


def plain_copy(model: GenerativeAdapter) -> PreTrainedModel:
    """The base of a model without generators, built anew from its configuration and parameters."""
    config = copy.deepcopy(model.base.config)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    base.to(model.base.dtype).load_state_dict(model.base.state_dict())
    return base.eval().requires_grad_(False)


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape)


def random_context(length: int) -> list[int]:
    return [int(token) for token in random_ids(length)]


def logits_of(base: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return base(input_ids=ids, use_cache=False).logits


def same_adapters(left: Adapter, right: Adapter) -> bool:
    """Bit by bit, descriptions included."""
    return (
        left._description() == right._description()
        and left.lora_a.keys() == right.lora_a.keys()
        and all(torch.equal(left.lora_a[name], right.lora_a[name]) for name in left.lora_a)
        and all(torch.equal(left.lora_b[name], right.lora_b[name]) for name in left.lora_a)
        and all(left.lora_a[name].dtype == right.lora_a[name].dtype for name in left.lora_a)
    )


def add_lora(base: PreTrainedModel, config: Any) -> None:
    """By transformers, whose newest release may ask for a PEFT that is not there yet."""
    try:
        base.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} and PEFT: {error}")
