"""Operations from shapes against those that PyTorch counts while the model runs."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from counted import PRODUCTS, counting, make_transparent
from tiny import SIZES, make_base, make_model, random_ids
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from gakernels import Adapter, GenerativeAdapter, GeneratorConfig
from gakernels.cost import flops
from gakernels.cost.flops import Flops, attention_pairs
from gakernels.cost.shapes import ModelShape
from gakernels.errors import InputError
from gakernels.evaluation.cost import COUNTED_METHODS, CostSettings, MethodCost, method_cost
from gakernels.model.attachment import cache_name
from gakernels.nn import CompactFactors

BASES = ("llama", "mistral", "qwen2", "gemma", "phi3", "gpt_neox")


def number(low: int, high: int) -> int:
    return int(torch.randint(low, high, ()))


def settings() -> CostSettings:
    return CostSettings(number(3, 9), number(1, 5), number(3, 9), number(1, 4))


def generate(base: PreTrainedModel, tokens: int, new: int, cache: DynamicCache | None = None) -> None:
    """Reads so many tokens behind those in the cache, and answers with exactly so many new ones."""
    before = 0 if cache is None else cache.get_seq_length()
    ids = random_ids(1, before + tokens)
    base.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **{cache_name(base): cache},
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    with torch.no_grad(), counting() as counter:
        result = run()
    return counter.get_total_flops(), result


def expected(
    method: str, model: GenerativeAdapter | PreTrainedModel, config: GeneratorConfig, context: int, given: CostSettings
) -> MethodCost:
    base = model.base if isinstance(model, GenerativeAdapter) else model
    return method_cost(method, ModelShape.from_config(base.config), config, context, given)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("method", ["closed_book", "prompt", "retrieval", "prompt_cached"])
def test_reading_and_answering(family: str, method: str) -> None:
    base, given, context = make_base(family), settings(), number(10, 40)
    cost = expected(method, base, GeneratorConfig(linears=("o_proj",)), context, given)
    cache = None
    if method == "prompt_cached":
        cache = DynamicCache(config=base.config)
        found, _ = counted(lambda: base.get_decoder()(input_ids=random_ids(1, context), **{cache_name(base): cache}))
        assert found == cost.contextualization.total
    else:
        assert cost.contextualization.total == 0
    read = given.prompt_tokens + {"prompt": context, "retrieval": given.retrieved_tokens}.get(method, 0)
    found, _ = counted(lambda: generate(base, read, given.new_tokens, cache))
    assert found == cost.query.total


CONFIGS: dict[str, dict[str, Any]] = {
    "usual": {},
    "one_layer": {"layers": (1,), "linears": ("q_proj", "down_proj")},
    "frobenius": {"norm": "frobenius"},
    "more_iterations": {"power_iterations": 2, "state_size": 12, "rank": 5},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", [1, 3, 10])
def test_generated_adapters(name: str, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make_model(**{"linears": ("o_proj", "down_proj"), **CONFIGS[name]}), settings()
    context = 6 * chunks - number(0, 5)
    ids, prompt = random_ids(context).tolist(), random_ids(1, given.prompt_tokens)
    model.base_fingerprint(), model.generator_fingerprint()
    make_transparent(monkeypatch)
    base = model.base

    found, states = counted(lambda: model.states([ids]))
    shape = ModelShape.from_config(base.config)
    assert found == flops.context_states(shape, model.config, context).total
    made, adapters = counted(lambda: model.adapters(states, [context]))
    assert found + made == expected("adapter", model, model.config, context, given).contextualization.total

    def answer() -> None:
        with model.adapted(adapters[0]):
            generate(base, prompt.shape[1], given.new_tokens)

    assert counted(answer)[0] == expected("adapter", model, model.config, context, given).query.total
    check_with_retrieval(model, adapters[0], context, given)
    merged, _ = counted(lambda: model.merge(adapters[0]))
    cost = expected("adapter_merged", model, model.config, context, given)
    assert found + made + merged == cost.contextualization.total
    assert counted(lambda: generate(base, prompt.shape[1], given.new_tokens))[0] == cost.query.total
    model.unmerge()
    check_numbers(model, adapters[0], states, context)
    if model.config.norm == "polar":
        check_compact(model, states, context, found, given)


def check_with_retrieval(model: GenerativeAdapter, adapter: Adapter, context: int, given: CostSettings) -> None:
    cost = expected("adapter_retrieval", model, model.config, context, given)
    alone = expected("adapter", model, model.config, context, given)
    assert cost.contextualization == alone.contextualization
    assert cost.storage.numbers == alone.storage.numbers + context

    def answer() -> None:
        with model.adapted(adapter):
            generate(model.base, given.prompt_tokens + min(given.retrieved_tokens, context), given.new_tokens)

    assert counted(answer)[0] == cost.query.total


def check_numbers(model: GenerativeAdapter, adapter: Adapter, states: dict[str, Tensor], context: int) -> None:
    cost = expected("adapter", model, model.config, context, CostSettings(number_bytes=4))
    assert cost.storage.numbers == adapter.numbers()
    assert cost.storage.bytes == 4 * adapter.numbers()


def check_compact(
    model: GenerativeAdapter, states: dict[str, Tensor], context: int, reading: int, given: CostSettings
) -> None:
    cost = expected("adapter_compact", model, model.config, context, given)
    made, compacts = counted(lambda: model.compact_adapters(states, [context]))
    assert reading + made == cost.contextualization.total
    assert cost.storage.numbers == compacts[0].numbers()
    factors = {
        name: CompactFactors(
            model.generator(name).output_map,
            model.generator(name).input_map,
            compacts[0].left[name][None],
            compacts[0].right[name][None],
            model.config.adapter_scale,
        )
        for name in model.adapted_names
    }

    def answer() -> None:
        with model.using(factors):
            generate(model.base, given.prompt_tokens, given.new_tokens)

    assert counted(answer)[0] == cost.query.total


def train(base: PreTrainedModel, sequences: int, length: int, epochs: int) -> int:
    with counting() as counter:
        for _ in range(epochs * sequences):
            ids = random_ids(1, length)
            base(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("linears", [("o_proj",), ("down_proj",), ("q_proj",), ("v_proj", "up_proj")])
@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_lora_tuning(linears: tuple[str, ...], layers: tuple[int, ...] | None) -> None:
    base, given, context = make_base(), settings(), number(5, 40)
    config = GeneratorConfig(linears=linears, layers=layers, state_size=8, rank=3, chunk_size=9)
    cost = expected("lora_tuning", base, config, context, given)
    lora = peft.LoraConfig(r=3, target_modules=list(linears), layers_to_transform=layers and list(layers))
    tuned = peft.get_peft_model(base, lora)
    assert cost.storage.numbers == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    chunks, length = flops.even_chunks(context, 9)
    found = train(tuned, chunks, length, given.epochs)
    assert found == cost.contextualization.total
    with torch.no_grad():
        assert counted(lambda: generate(tuned, given.prompt_tokens, given.new_tokens))[0] == cost.query.total
    static = expected("static_lora", base, config, context, given)
    assert static.query == cost.query
    assert (static.contextualization.total, static.storage.numbers) == (0, 0)


@pytest.mark.parametrize("family", BASES)
def test_full_tuning(family: str) -> None:
    base, given, context = make_base(family), settings(), number(5, 40)
    config = GeneratorConfig(linears=("o_proj",), chunk_size=9)
    cost = expected("full_tuning", base, config, context, given)
    assert cost.storage.numbers == sum(parameter.numel() for parameter in base.parameters())
    chunks, length = flops.even_chunks(context, 9)
    assert train(base, chunks, length, given.epochs) == cost.contextualization.total


def test_every_method_is_counted_in_this_file() -> None:
    here = {"closed_book", "prompt", "prompt_cached", "retrieval", "lora_tuning", "full_tuning"}
    assert set(COUNTED_METHODS) == here | {
        "adapter",
        "adapter_merged",
        "adapter_compact",
        "adapter_retrieval",
        "static_lora",
    }


def test_pytorchs_own_rules_agree_up_to_the_half_of_attention_that_the_mask_leaves_out() -> None:
    config = transformers.LlamaConfig(**{**SIZES, "hidden_size": 64, "max_position_embeddings": 512})
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    shape, tokens = ModelShape.from_config(config), number(100, 200)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        base(input_ids=random_ids(1, tokens), use_cache=False)
    ours = flops.decoder(shape, tokens) + flops.head(shape, tokens)
    whole_square = ours.attention * 2 * tokens // (tokens + 1)
    assert counter.get_total_flops() == ours.total - ours.attention + whole_square


@pytest.mark.parametrize("window", [None, 1, 7, 30])
def test_pairs_are_those_of_the_mask(window: int | None) -> None:
    tokens, before = number(1, 20), number(0, 20)
    positions = torch.arange(before + tokens)
    distance = positions[before:, None] - positions
    seen = (distance >= 0) & (distance < (window or 1000))
    assert attention_pairs(tokens, before, window) == int(seen.sum())


def test_parts_add_up() -> None:
    one, two = Flops(*range(1, 6)), Flops(*random_ids(5).tolist())
    assert (one + two * 3).to_dict() == {
        **{name: value + 3 * getattr(two, name) for name, value in vars(one).items()},
        "total": 15 + 3 * two.total,
    }


def test_even_chunks_are_those_of_the_model() -> None:
    from gakernels.model.windows import split_evenly

    for _ in range(20):
        tokens, chunk = number(1, 60), number(1, 12)
        chunks = split_evenly(list(range(tokens)), chunk)
        assert flops.even_chunks(tokens, chunk) == (len(chunks), max(len(part) for part in chunks))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linears": ("o_prj",)}, "no linear layer is named 'o_prj'; there are self_attn.q_proj, "),
        ({"layers": (0, 3)}, "layers must be between 0 and 2, but they are"),
    ],
)
def test_a_generator_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    shape = ModelShape.from_config(make_base().config)
    with pytest.raises(InputError, match=message):
        method_cost("adapter", shape, GeneratorConfig(**options), 10)
