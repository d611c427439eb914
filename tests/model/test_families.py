"""Generators attach to every family of decoder-only models, leave the base as it is, and come off again."""

import pytest
import torch
from tiny import FAMILIES, logits_of, make_base, make_config, make_model, make_trained, random_context, random_ids
from torch import nn

from gakernels import AdaptedLinear, GenerativeAdapter, InputError

families = pytest.mark.parametrize("family", FAMILIES)
DTYPES = [(name, torch.float32) for name in FAMILIES] + [
    (name, dtype) for name in ("llama", "qwen2", "gemma2") for dtype in (torch.bfloat16, torch.float16)
]


def in_a_context_pass(model: GenerativeAdapter, ids: torch.Tensor) -> torch.Tensor:
    """Logits of windows (B, M), taken as context chunks of one row, each seeing those before it."""
    count = ids.shape[0]
    mask = torch.ones(1, *ids.shape, dtype=torch.bool)
    with torch.no_grad():
        return model.logits(model(ids[None], mask, count, range(count))[0])[0]


@pytest.mark.parametrize(("family", "dtype"), DTYPES)
def test_the_adapter_at_start_changes_no_bit_of_the_logits(family: str, dtype: torch.dtype) -> None:
    base, ids = make_base(family, dtype), random_ids(3, 7)
    expected = logits_of(base, ids)
    model = GenerativeAdapter(base, make_config(family))
    adapter = model.adapt([random_context(15)])[0]
    assert all(factor.abs().max() > 0 for factor in adapter.lora_a.values())
    with model.adapted(adapter):
        assert torch.equal(logits_of(base, ids), expected)
    assert torch.equal(in_a_context_pass(model, ids), expected)  # also checks `logits` against the model's own head


@pytest.mark.parametrize(("family", "dtype"), DTYPES)
def test_an_adapter_acts_on_every_adapted_layer_as_its_delta_does(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    adapter = model.adapt([random_context(15)])[0]
    layers = model.base.config.num_hidden_layers
    assert len(model.adapted_names) == layers * len(FAMILIES[family][2])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for name in model.adapted_names:
        linear = model.base.get_submodule(name)
        x = torch.randn(2, 5, linear.in_features, dtype=dtype)
        bias = 0 if linear.bias is None else linear.bias.double()
        expected = x.double() @ (linear.weight.double() + adapter.delta(name).double()).T + bias
        with model.adapted(adapter), torch.no_grad():
            y = linear(x)
        assert y.dtype == dtype
        assert (y - expected).abs().max() <= tolerance * expected.abs().max()
        with torch.no_grad():
            assert (linear(x) - expected).abs().max() > 2 * tolerance * expected.abs().max()


@families
def test_the_base_keeps_its_parameters_names_and_layers(family: str) -> None:
    base = make_base(family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    classes = {name: type(module) for name, module in base.named_modules()}
    model = make_trained(GenerativeAdapter(base, make_config(family)))
    assert list(base.state_dict()) == list(before)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert {name for name, _ in base.named_modules()} == set(classes)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    old = {name: tensor.clone() for name, tensor in model.generator_tensors().items()}
    ids, mask = random_ids(1, 3, 6), torch.ones(1, 3, 6, dtype=torch.bool)
    model.train()
    model.logits(model(ids, mask, 2, [0, 1, 2])[0]).square().mean().backward()
    optimizer.step()
    changed = [name for name, tensor in model.generator_tensors().items() if not torch.equal(tensor, old[name])]
    assert len(changed) == 5 * len(model.adapted_names)  # every parameter, no sketch
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not base.training

    assert model.detach() is base
    assert {name: type(module) for name, module in base.named_modules()} == classes
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_tied_embeddings_stay_tied() -> None:
    base = make_base("llama_tied")
    model = GenerativeAdapter(base, make_config("llama_tied"))
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    model.detach()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight


def test_the_families_cover_grouped_queries_biases_and_capped_logits() -> None:
    assert make_base("llama").model.layers[0].self_attn.k_proj.out_features == 16
    assert make_base("qwen2").model.layers[0].self_attn.q_proj.bias.abs().max() > 0
    assert logits_of(make_base("gemma2"), random_ids(1, 9)).abs().max() <= 1.5


def test_layers_and_linears_can_be_chosen() -> None:
    base = make_base()
    model = GenerativeAdapter(base, make_config(linears=("self_attn.o_proj", "up_proj"), layers=(2, 0)))
    assert model.adapted_names == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.2.self_attn.o_proj",
        "model.layers.2.mlp.up_proj",
    ]
    adapted = [name for name, module in base.named_modules() if isinstance(module, AdaptedLinear)]
    assert adapted == model.adapted_names


def test_generators_start_the_same_for_the_same_seed_only() -> None:
    tensors = [GenerativeAdapter(make_base(), make_config(seed=number)).generator_tensors() for number in (5, 5, 6)]
    drawn = [name for name in tensors[0] if not name.endswith(("output_map", "norm_weight"))]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in drawn)
    assert not any(torch.equal(tensors[0][name], tensors[2][name]) for name in drawn)


def test_another_tower_with_as_many_layers_is_not_taken_for_the_decoder() -> None:
    base = make_base()
    first = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    base._modules = {"tower": first, **base._modules}
    assert GenerativeAdapter(base, make_config()).adapted_names[0] == "model.layers.0.self_attn.o_proj"


class OtherLinear(nn.Linear):
    """A linear layer that computes in its own way, as quantised ones do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def test_a_linear_layer_with_its_own_forward_keeps_it() -> None:
    base, ids = make_base(), random_ids(2, 9)
    base.model.layers[1].mlp.down_proj = OtherLinear(48, 32, bias=False)
    before = logits_of(base, ids)
    model = make_trained(GenerativeAdapter(base, make_config()))
    torch.testing.assert_close(logits_of(model.base, ids), before)
    adapter = model.adapters(model.states([random_context(9)]), [9])[0]
    with model.adapted(adapter):
        adapted = logits_of(model.base, ids)
    with pytest.raises(InputError, match="nor into layers with a forward of their own"):
        model.merge(adapter)
    base = model.detach()
    for name in adapter.lora_a:
        linear = base.get_submodule(name)
        linear.weight.data.add_(adapter.delta(name))
    torch.testing.assert_close(logits_of(base, ids), adapted, rtol=1e-4, atol=1e-4)
