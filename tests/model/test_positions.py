"""What does not fit a base model's positions is refused, by one rule."""

from typing import Any

import pytest
import torch
import transformers
from tiny import SIZES, make_base, make_config, make_model, random_ids
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gakernels import GenerativeAdapter, InputError
from gakernels.model.positions import check_prompt, position_limit

ROPE = {"rope_theta": 10000.0, "factor": 4.0}
YARN = {**ROPE, "rope_type": "yarn"}
LLAMA3 = {
    **ROPE,
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}
LAYERS = {kind: {"rope_type": "linear", **ROPE} for kind in ("full_attention", "sliding_attention")}


@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("Llama", {}, 128),
        ("Mistral", {"sliding_window": 5}, 128),  # the window slides over all positions
        ("GPT2", {"max_position_embeddings": 77}, 77),  # there the name stands for n_positions
        ("OPT", {}, 128),
        ("Llama", {"rope_parameters": {"rope_type": "linear", **ROPE}}, 512),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", **ROPE}}, 512),
        ("Qwen2", {"rope_parameters": YARN}, 512),
        ("Qwen2", {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}}, 256),
        ("Llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 32}}, 128),  # counted in
        ("Llama", {"rope_parameters": LLAMA3}, 128),
        ("Phi3", {"rope_parameters": LONGROPE}, 128),
        ("Gemma3Text", {"rope_parameters": LAYERS}, 128),  # counted in
        ("Falcon", {"alibi": False}, 128),
        ("Falcon", {"alibi": True}, None),
    ],
)
def test_the_limit_of_a_configuration(family: str, settings: dict[str, Any], limit: int | None) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    assert position_limit(config) == limit


@pytest.mark.parametrize("family", ["Bloom", "Mpt", "Mamba", "FalconMamba"])
def test_models_without_positions_have_no_limit(family: str) -> None:
    assert position_limit(getattr(transformers, f"{family}Config")()) is None


def test_a_chunk_that_does_not_fit_is_refused_before_anything_is_changed() -> None:
    base = make_base()
    with pytest.raises(InputError, match="at most the 128 positions of the base model, but it is 129"):
        GenerativeAdapter(base, make_config(chunk_size=129))
    assert all(parameter.requires_grad for parameter in base.parameters())
    model = GenerativeAdapter(base, make_config(chunk_size=128))
    assert model.adapt(random_ids(300).tolist()).tokens_seen == 300


def test_a_window_that_does_not_fit_is_refused() -> None:
    model, ids = make_model(), random_ids(1, 2, 129)
    with pytest.raises(InputError, match="at most the 128 positions of the base model long, but are 129"):
        model(ids, torch.ones_like(ids, dtype=torch.bool), 1, (0, 1))


def test_learned_positions_are_never_exceeded() -> None:
    config = transformers.OPTConfig(**{**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32})
    base = AutoModelForCausalLM.from_config(config)
    model = GenerativeAdapter(base, make_config(linears=("out_proj",), chunk_size=128))
    assert model.adapt(random_ids(256).tolist()).tokens_seen == 256


def prompt(tokens: int) -> str:
    return " ".join(["w3"] * (tokens - 1))  # and BOS


def test_a_prompt_and_its_continuation_must_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer=tokenizer)
    assert len(model.generate(prompt(120), max_new_tokens=8)) == 1
    for tokens, options, new in (
        (121, {"max_new_tokens": 8}, 8),
        (128, {}, 1),
        (300, {}, 1),
        (5, {"max_length": 129}, 124),
        (5, {"generation_config": transformers.GenerationConfig(max_new_tokens=124)}, 124),
    ):
        with pytest.raises(
            InputError, match=rf"the model reads 128 tokens, but the prompt has {tokens} and max_new_tokens is {new}$"
        ):
            model.generate([prompt(3), prompt(tokens)], **options)


def test_without_a_length_as_much_is_written_as_there_is_room_for(tokenizer: PreTrainedTokenizerFast) -> None:
    model, written = make_model(tokenizer=tokenizer), []
    model.base.register_forward_hook(lambda *_: written.append(1))
    for tokens, wanted in ((10, 32), (126, 2)):
        written.clear()
        model.generate(prompt(tokens), eos_token_id=VOID)
        assert len(written) == wanted


VOID = 10**6  # no token: nothing ends a text early


def test_without_positions_there_is_no_limit() -> None:
    check_prompt(None, 10**9, 10**9)
