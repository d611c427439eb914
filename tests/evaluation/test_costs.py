"""Shapes of models, the paper's table 1, and costs of a context."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from tiny import FAMILIES, SIZES, make_base, random_ids
from transformers import DynamicCache

from gakernels import GeneratorConfig
from gakernels.cost.shapes import SHAPES, ModelShape
from gakernels.errors import InputError
from gakernels.evaluation.cost import CostSettings, adapter_numbers, all_costs, key_value_numbers, method_cost
from gakernels.evaluation.cost import stream_state as stream_state_of
from gakernels.evaluation.paper import TABLE_1, table_1
from gakernels.model.attachment import cache_name

MISTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000}
PRETRAINED = {
    "mistral-7b": transformers.MistralConfig(
        **MISTRAL, num_attention_heads=32, num_key_value_heads=8, sliding_window=None
    ),
    "llama2-7b": transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
}
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
}


def config_of(family: str, **settings: Any) -> transformers.PreTrainedConfig:
    name, own, _ = FAMILIES[family]
    return getattr(transformers, name)(**{**SIZES, **own, **settings})


@pytest.mark.parametrize("name", PRETRAINED)
def test_well_known_shapes_are_those_of_their_configurations(name: str) -> None:
    assert ModelShape.from_config(PRETRAINED[name], name) == SHAPES[name]


def test_well_known_shapes_have_the_published_numbers_of_parameters() -> None:
    assert {name: shape.parameters for name, shape in SHAPES.items()} == PARAMETERS


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mixtral"}))
def test_shapes_of_all_families(family: str) -> None:
    base = make_base(family)
    shape = ModelShape.from_config(base.config)
    assert shape.parameters == sum(parameter.numel() for parameter in base.parameters())
    assert shape.vocabulary == base.get_output_embeddings().out_features
    for tokens in (4, 9):  # fewer and more than the sliding windows reach back
        cache = DynamicCache(config=base.config)
        with torch.no_grad():
            base(input_ids=random_ids(1, tokens), **{cache_name(base): cache})
        kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        assert key_value_numbers(shape, tokens) == kept
    weights = sum(
        module.weight.numel() for module in base.get_decoder().layers[0].modules() if type(module) is torch.nn.Linear
    )
    assert sum(linear.weights for linear in shape.linears) == weights


def test_layers_run_in_the_order_in_which_they_depend_on_each_other() -> None:
    names = [[linear.name for linear in stage] for stage in ModelShape.from_config(config_of("phi3")).stages]
    assert names == [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]]


def test_sliding_windows_are_those_of_the_configuration() -> None:
    assert ModelShape.from_config(config_of("mistral", sliding_window=7)).windows == (7, 7, 7)
    assert ModelShape.from_config(config_of("gemma2", sliding_window=7)).windows == (7, None, 7)
    assert ModelShape.from_config(config_of("qwen2", sliding_window=7)).windows == (None, None, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: config_of("mixtral"), "matrices in linear layers, but mlp.* is of another kind"),
        (lambda: transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64), "but attn.c_attn.weight is"),
        (lambda: transformers.ViTConfig(), "must be that of a causal language model, but it is not"),
        (
            lambda: transformers.BertConfig(num_hidden_layers=1),
            "reads a token and keeps its keys and values, but it is",
        ),
    ],
)
def test_other_models_are_refused(config: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelShape.from_config(config())


def test_the_storage_column_of_table_1_comes_from_shapes() -> None:
    shape, mega = SHAPES["mistral-7b"], 2**20
    assert key_value_numbers(shape, 1) == 64 * 2**10
    assert adapter_numbers(shape, GeneratorConfig()) == 32 * mega
    for row in table_1():
        if row.paper.at_least:
            assert row.mega_floats >= row.paper.mega_floats
        else:
            assert row.mega_floats == row.paper.mega_floats


def test_table_1_is_the_papers() -> None:
    values = [(row.tera_operations, row.floats) for row in TABLE_1]
    assert values == [
        (0.505, "0"),
        (2.059, "128+"),
        (0.514, "4"),
        (0.552, "8"),
        (0.627, "16"),
        (0.772, "32"),
        (1.067, "64"),
        (1.658, "128"),
        (0.505, "32"),
    ]


def test_the_released_estimate_gives_the_three_rows_that_it_can() -> None:
    rows = {row.paper.model: row for row in table_1()}
    for model in ("Closed-book", "Full-conversation Prompting", "Generative Adapter"):
        assert round(rows[model].estimate, 3) == rows[model].paper.tera_operations
    assert all(row.estimate > row.paper.tera_operations for model, row in rows.items() if "Ultragist" in model)


def test_prompting_with_a_cache_costs_a_few_percent_more_than_closed_book() -> None:
    rows = {row.paper.model: row.operations for row in table_1()}
    assert rows["Full-conversation Prompting"] / rows["Closed-book"] == pytest.approx(1.088, abs=1e-3)
    assert rows["Generative Adapter"] / rows["Closed-book"] == pytest.approx(1.005, abs=1e-3)


def test_costs_grow_with_the_context_where_they_should() -> None:
    costs = all_costs(SHAPES["mistral-7b"], GeneratorConfig(), [1024, 4096])
    few, many = ({row.method: row for row in rows} for rows in costs.values())
    for method in few:
        grows = many[method].query.total > few[method].query.total
        assert grows == (method in ("prompt", "prompt_cached")), method
        kept = many[method].storage.numbers > few[method].storage.numbers
        assert kept == (method in ("prompt", "prompt_cached", "retrieval", "adapter_retrieval")), method
    assert few["prompt"].query.total > few["retrieval"].query.total > few["closed_book"].query.total
    assert many["adapter"].contextualization.total < 1.02 * many["prompt_cached"].contextualization.total


def test_bytes_are_those_of_the_numbers() -> None:
    shape, config = SHAPES["mistral-7b"], GeneratorConfig()
    cost = method_cost("adapter", shape, config, 100, CostSettings(number_bytes=1))
    assert cost.storage.bytes == cost.storage.numbers
    assert method_cost("prompt", shape, config, 100).storage.bytes == 400
    assert dataclasses.astuple(stream_state_of(shape, config)) == ("states", 32 * 2**20, 4 * 32 * 2**20)


def test_a_frobenius_generator_has_no_compact_form() -> None:
    shape, config = SHAPES["mistral-7b"], GeneratorConfig(norm="frobenius")
    assert "adapter_compact" not in {row.method for row in all_costs(shape, config, [9])[9]}
    with pytest.raises(InputError, match="no compact form"):
        method_cost("adapter_compact", shape, config, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda shape: method_cost("magic", shape, GeneratorConfig(), 9), "method must be one of closed_book, "),
        (lambda shape: method_cost("prompt", shape, GeneratorConfig(), 0), "context must be at least 1 token"),
        (lambda shape: CostSettings(new_tokens=0), "new_tokens must be at least 1, but it is 0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(SHAPES["mistral-7b"])
