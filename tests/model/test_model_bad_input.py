"""Wrong input to the model layer is refused with a message that names it; and what is odd but right is taken."""

import copy
import math
import pickle

import pytest
import torch
from tiny import make_base, make_config, make_model, random_context, random_ids
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gakernels import GenerativeAdapter, GeneratorConfig, InputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"linears": ()}, "linears must have at least 1 entry, but it has 0"),
        ({"linears": "o_proj"}, "linears must be a list, but it is 'o_proj'"),
        ({"layers": ()}, "layers must be different numbers, at least one"),
        ({"layers": (1, 1)}, "layers must be different numbers"),
        ({"state_size": True}, "state_size must be an integer, but it is True"),
        ({"linears": ("o_proj", 3)}, r"linears\[1\] must be text, but it is 3"),
        ({"scale": "large"}, "scale must be a number, but it is 'large'"),
        ({"rank": 17}, r"rank must be between 1 and state_size \(16\), but it is 17"),
        ({"rank": 0}, "rank must be between 1"),
        ({"state_size": 0, "rank": 0}, "state_size must be at least 1, but it is 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, but it is 0"),
        ({"norm": "sigmoid"}, "norm must be one of polar, frobenius, but it is 'sigmoid'"),
        ({"damping": -1e-3}, "damping must be finite and at least 0, but it is -0.001"),
        ({"damping": math.nan}, "damping must be finite"),
        ({"power_iterations": -1}, "power_iterations must be at least 0, but it is -1"),
        ({"scale": math.inf}, "scale must be finite, but it is inf"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(**settings)


@pytest.mark.parametrize(("name", "hint"), [("ranks", r"did you mean rank\?"), ("flux", "known are .*rank, scale")])
def test_an_unknown_setting_is_named_beside_the_nearest_one_or_all(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"^{name} is not a setting; {hint}"):
        GeneratorConfig.from_dict({name: 3, "rank": 4})


def test_settings_survive_their_dictionary() -> None:
    config = make_config(layers=(0, 2), norm="frobenius", scale=None)
    assert GeneratorConfig.from_dict(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(copy.deepcopy(config)) == hash(config)
    assert config.adapter_scale == 4.0  # alpha 64 / d_r 16


def test_an_unknown_linear_layer_is_refused_with_a_list_of_those_there_are() -> None:
    base = make_base()
    with pytest.raises(InputError, match=r"named 'proj'; there are .*self_attn\.o_proj.*mlp\.down_proj"):
        GenerativeAdapter(base, make_config(linears=("o_proj", "proj")))
    assert all(parameter.requires_grad for parameter in base.parameters())  # untouched


@pytest.mark.parametrize("number", [-1, 3])
def test_a_layer_number_out_of_range_is_refused(number: int) -> None:
    with pytest.raises(InputError, match=f"layers must be between 0 and 2, but contains {number}"):
        GenerativeAdapter(make_base(), make_config(layers=(0, number)))


def test_a_model_without_linear_layers_is_refused() -> None:
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20))
    with pytest.raises(InputError, match=r"no linear layer is named 'o_proj'; there are attn\.c_attn, "):
        GenerativeAdapter(base, make_config())


def test_attaching_twice_is_refused_until_the_first_is_detached() -> None:
    model = make_model()
    with pytest.raises(InputError, match=r"already carries generators; call detach\(\)"):
        GenerativeAdapter(model.base, make_config())
    base = model.detach()
    assert GenerativeAdapter(base, make_config()).adapted_names


def test_a_context_must_have_tokens_of_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer=tokenizer)
    for context, message in (
        ([], "at least one token"),
        ("", "at least one token"),
        (" \n", "at least one token"),
        ([3, 64], r"between 0 and 63, but 3\.\.64"),
        ([-1, 3], r"between 0 and 63, but -1\.\."),
        (["w3", "w4"], "a text or a sequence of token ids"),
        (torch.ones(2, 3), "a text or a sequence of token ids"),
        (7, "a text or a sequence of token ids"),
    ):
        for read in (model.stream().append, lambda context: model.adapt([[5, 6], context])):
            with pytest.raises(InputError, match=message):
                read(context)


def test_adapt_wants_a_context(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="must be at least one context"):
        make_model(tokenizer=tokenizer).adapt([])


def test_text_needs_a_tokenizer() -> None:
    model = make_model()
    for use in (lambda: model.stream().append("w3"), lambda: model.adapt(["w3"]), lambda: model.generate("w3")):
        with pytest.raises(InputError, match="tokenizer is needed"):
            use()


def test_generate_wants_prompts_with_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer=tokenizer)
    assert len(model.generate(["", "w3"], max_new_tokens=2)) == 2  # the empty one has its BOS token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    for prompts in ([], "", ["w3", ""]):
        with pytest.raises(InputError, match="at least one prompt, each of at least one token"):
            model.generate(prompts)


def test_a_mask_of_another_shape_or_dtype_is_refused() -> None:
    model, ids = make_model(), random_ids(2, 3, 6)
    good = torch.ones_like(ids, dtype=torch.bool)
    for wrong_ids, mask in ((ids, good[:, :2]), (ids, good.long()), (ids, good[:, :, :5]), (ids[0], good[0])):
        with pytest.raises(InputError, match=r"input_ids must have shape \(B, W, M\) and mask must be bool"):
            model(wrong_ids, mask, 3, [0, 1, 2])


@pytest.mark.parametrize(
    ("chunks", "seen", "message"),
    [
        (0, [0, 0, 0], "chunks must be between 1 and the 3 windows"),
        (4, [0, 1, 2], "chunks must be between 1 and the 3 windows"),
        (2, [0, 1], "seen have one entry for each"),
        (2, [0, 1, 3], "seen must be between 0 and the 2 context chunks"),
        (2, [0, -1, 1], "seen must be between 0 and the 2 context chunks"),
    ],
)
def test_chunks_and_seen_out_of_range_are_refused(chunks: int, seen: list[int], message: str) -> None:
    ids = random_ids(1, 3, 6)
    with pytest.raises(InputError, match=message):
        make_model()(ids, torch.ones_like(ids, dtype=torch.bool), chunks, seen)


def test_initial_states_must_be_there_for_every_layer_and_row() -> None:
    model, ids = make_model(), random_ids(2, 3, 6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    states = model.states([random_context(6)] * 2)
    name = model.adapted_names[3]
    with pytest.raises(InputError, match=rf"initial_states must .*{name} is missing"):
        model(ids, mask, 3, [0, 1, 2], {key: value for key, value in states.items() if key != name})
    with pytest.raises(InputError, match="initial_state must have shape"):
        model(ids, mask, 3, [0, 1, 2], {key: value[:1] for key, value in states.items()})


def test_the_rows_of_a_batch_must_be_a_multiple_of_the_adapters(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer=tokenizer)
    adapters = model.adapt([random_context(9), random_context(9)])
    with model.adapted(adapters):
        with pytest.raises(InputError, match="rows of the batch must be a multiple of the 2 adapters, but there are 3"):
            model.base(input_ids=random_ids(3, 5))
        with pytest.raises(InputError, match="multiple of the 2 adapters"):
            model.generate("w3 w4")


def test_adapters_in_one_batch_must_fit_together() -> None:
    model = make_model()
    adapter = model.adapt([random_context(9)])[0]
    narrow = type(adapter)(
        {name: factor[:2] for name, factor in adapter.lora_a.items()},
        {name: factor[:, :2] for name, factor in adapter.lora_b.items()},
        **adapter._description(),
    )
    louder = type(adapter)(adapter.lora_a, adapter.lora_b, **{**adapter._description(), "scale": 3.0})
    for adapters in ([adapter, narrow], [adapter, louder]):
        with pytest.raises(InputError, match="same scale and rank"), model.adapted(adapters):
            pass
    with pytest.raises(InputError, match="at least one adapter"), model.adapted([]):
        pass


def test_a_long_context_takes_more_passes_and_not_larger_ones() -> None:
    model, sizes = make_model(chunk_size=3), []
    model.base.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    stream = model.stream().append(random_context(120), chunks_per_pass=1)
    assert sizes == [(1, 3)] * 40
    assert stream.tokens_seen == 120
    sizes.clear()
    model.states([random_context(60), random_context(6)], chunks_per_pass=4)
    assert sizes == [(8, 3)] * 5
    with pytest.raises(InputError, match="chunks_per_pass must be at least 1, but it is 0"):
        model.states([[5]], chunks_per_pass=0)
    assert stream.adapter().lora_b[model.adapted_names[0]].isfinite().all()
