"""AdapterGenerator: its start, its sketch, its norms, and that it is the composition of the operations."""

import copy
import io

import pytest
import torch
from torch import Generator, Tensor

from gakernels import AdapterGenerator, InputError
from gakernels.ops import context_state, low_rank_polar

SIZES = {"hidden_size": 12, "in_features": 10, "out_features": 14}


def build(**options: object) -> AdapterGenerator:
    return AdapterGenerator(**{**SIZES, "state_size": 8, "rank": 3, **options})


def trained(generator: Generator, **options: object) -> AdapterGenerator:
    """A generator in float64 with every parameter drawn afresh."""
    module = build(dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def draw_hidden(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, 12, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("norm", ["polar", "frobenius"])
def test_the_adapter_is_zero_at_start_and_only_the_output_map_holds_it_there(generator: Generator, norm: str) -> None:
    module, hidden = build(norm=norm), draw_hidden(generator, 2, 3, 4).float()
    lora_a, lora_b, _ = module(hidden)
    assert (lora_b == 0).all()
    assert lora_a.norm() > 0
    (lora_b @ lora_a).sum().backward()
    assert module.output_map.grad.norm() > 0
    assert all(p.grad is None or (p.grad == 0).all() for n, p in module.named_parameters() if n != "output_map")


@pytest.mark.parametrize("norm", ["polar", "frobenius"])
def test_equals_the_equations(generator: Generator, norm: str) -> None:
    """Delta W = A1 norm(A2 (sum h h^T) B1) B2 with h the RMS-normed hidden states."""
    module = trained(generator, norm=norm, rank=8)  # rank = state size: the polar factor needs no sketch
    hidden = draw_hidden(generator, 2, 3, 100)
    with torch.no_grad():  # well-conditioned states: A2 with orthonormal rows, B1 = A2^T R with an orthogonal R
        module.norm_weight.uniform_(0.5, 1.5, generator=generator)
        module.value_projection.copy_(torch.linalg.qr(module.key_projection).Q.mT)
        rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
        module.key_projection.copy_(module.value_projection.mT @ rotation)
    lora_a, lora_b, states = module(hidden)
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm_weight
    moments = (normed.mT @ normed).cumsum(1)
    wanted_states = module.value_projection @ moments @ module.key_projection
    torch.testing.assert_close(states, wanted_states, rtol=1e-10, atol=1e-10)
    if norm == "frobenius":
        middle, tolerance = wanted_states / torch.linalg.matrix_norm(wanted_states)[..., None, None], 1e-10
    else:
        p, _, qt = torch.linalg.svd(wanted_states)
        middle = p @ qt
        module.damping, tolerance = 0.0, 1e-6
        lora_a, lora_b, _ = module(hidden)
    wanted = module.output_map @ middle @ module.input_map
    torch.testing.assert_close(lora_b @ lora_a, wanted, rtol=tolerance, atol=tolerance)


def test_it_is_the_composition_of_the_operations(generator: Generator) -> None:
    module, hidden = trained(generator, damping=0.02, power_iterations=2), draw_hidden(generator, 2, 3, 4)
    mask = torch.rand(2, 3, 4, generator=generator) < 0.7
    initial = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    lora_a, lora_b, states = module(hidden, mask, initial)
    normed = torch.nn.functional.rms_norm(hidden, (12,), module.norm_weight, 1e-6)
    wanted = context_state(normed, module.value_projection, module.key_projection, mask, initial)
    u, v = low_rank_polar(wanted, module.sketch, 2, 0.02)
    torch.testing.assert_close(states, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(lora_b, module.output_map @ u, rtol=0, atol=1e-12)
    torch.testing.assert_close(lora_a, v.mT @ module.input_map, rtol=0, atol=1e-12)


def test_on_the_output_side_the_sketch_multiplies_the_transpose(generator: Generator) -> None:
    module = trained(generator, sketch_side="output")
    states = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    v, u = low_rank_polar(states.mT, module.sketch, 1, module.damping)
    lora_a, lora_b = module.factors(states)
    wanted = module.output_map @ u @ v.mT @ module.input_map
    torch.testing.assert_close(lora_b @ lora_a, wanted, rtol=0, atol=1e-12)
    module.sketch_side = "input"
    lora_a, lora_b = module.factors(states)
    assert (lora_b @ lora_a - wanted).norm() > 0.05 * wanted.norm()


def test_gradcheck_through_the_whole_generator(generator: Generator) -> None:
    module, hidden = trained(generator, state_size=4, rank=2), draw_hidden(generator, 1, 2, 3)
    names = [name for name, _ in module.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in module.parameters()]

    def product(hidden: Tensor, *values: Tensor) -> Tensor:
        lora_a, lora_b, _ = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (hidden,))
        return lora_b @ lora_a

    assert torch.autograd.gradcheck(product, (hidden.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("norm", ["polar", "frobenius"])
def test_a_context_without_tokens_gives_no_adapter_and_finite_gradients(generator: Generator, norm: str) -> None:
    module, hidden = trained(generator, norm=norm), draw_hidden(generator, 1, 2, 3)
    hidden[0, 0] = float("nan")
    mask = torch.tensor([[[False] * 3, [True] * 3]])
    lora_a, lora_b, _ = module(hidden, mask)
    product = lora_b @ lora_a
    assert (product[0, 0] == 0).all()
    assert product[0, 1].norm() > 0
    product.square().sum().backward()
    gradients = {name: value.grad for name, value in module.named_parameters()}
    # the RMSNorm in front of the operation does see the padded tokens: their hidden states must be finite there
    assert all(value.isfinite().all() for name, value in gradients.items() if name != "norm_weight")


def test_the_frobenius_norm(generator: Generator) -> None:
    module = trained(generator, norm="frobenius")
    with torch.no_grad():
        module.output_map.copy_(torch.eye(14, 8))
        module.input_map.copy_(torch.eye(8, 10))
    states = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
    states[1] = 0
    leaf = states.clone().requires_grad_()
    lora_a, lora_b = module.factors(leaf)
    assert lora_a.shape == (3, 8, 10)  # the adapter has rank d_r
    product = (lora_b @ lora_a)[:, :8, :8]
    wanted = states[[0, 2]] / states[[0, 2]].square().sum((-2, -1), keepdim=True).sqrt()
    torch.testing.assert_close(product[[0, 2]], wanted, rtol=0, atol=1e-12)
    assert (product[1] == 0).all()
    product.pow(3).sum().backward()
    assert leaf.grad.isfinite().all()


def test_the_sketch_is_the_same_on_every_construction() -> None:
    torch.manual_seed(1)
    first = build()
    torch.manual_seed(2)
    second = build()
    assert torch.equal(first.sketch, second.sketch)
    assert not torch.equal(first.key_projection, second.key_projection)
    assert not torch.equal(first.sketch, build(sketch_seed=1).sketch)
    assert first.sketch.shape == (8, 3)
    assert "sketch" not in dict(first.named_parameters())


def test_construction_leaves_the_global_generator_to_the_parameters() -> None:
    """The sketch takes nothing from the global generator: another sketch seed gives the same parameters."""
    torch.manual_seed(3)
    first = build()
    torch.manual_seed(3)
    second = build(sketch_seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_state_dict_round_trip(generator: Generator) -> None:
    module = trained(generator, sketch_seed=7)
    hidden, file = draw_hidden(generator, 1, 2, 5), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = build(dtype=torch.float64)
    before = other(hidden)[1]
    other.load_state_dict(torch.load(file))
    for ours, wanted in zip(other(hidden), module(hidden), strict=True):
        assert torch.equal(ours, wanted)
    assert not torch.equal(before, module(hidden)[1])
    assert torch.equal(copy.deepcopy(module)(hidden)[1], module(hidden)[1])


def test_start_values_have_the_stated_spread() -> None:
    module = AdapterGenerator(300, 400, 20, state_size=200, rank=3)
    for parameter, fan_in in (
        (module.value_projection, 300),
        (module.key_projection, 300),
        (module.input_map, 400),
    ):
        assert parameter.std().item() == pytest.approx((1 / 3 / fan_in) ** 0.5, rel=0.05)
    assert (module.norm_weight == 1).all()


def test_low_precision_parameters_give_float32_states(generator: Generator) -> None:
    module, hidden = build(dtype=torch.bfloat16), draw_hidden(generator, 1, 2, 5).bfloat16()
    lora_a, lora_b, states = module(hidden)
    assert states.dtype == torch.float32
    assert lora_a.dtype == lora_b.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 9}, r"rank must be between 1 and state_size \(8\), but it is 9"),
        ({"rank": 0}, "rank must be between 1 and state_size"),
        ({"norm": "svd"}, "norm must be one of polar, frobenius, but it is 'svd'"),
        ({"sketch_side": "left"}, "sketch_side must be one of input, output, but it is 'left'"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"in_features": -1}, "in_features must be at least 1"),
        ({"out_features": 0}, "out_features must be at least 1"),
        ({"state_size": 0}, "state_size must be at least 1"),
    ],
)
def test_wrong_sizes_name_the_argument(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**options)


def test_under_autocast_no_wide_copy_of_the_hidden_states_is_kept(generator: Generator) -> None:
    module = trained(generator).float()
    hidden = draw_hidden(generator, 2, 3, 5).bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        states = module.states(hidden)
    assert not any(tensor.shape == hidden.shape and tensor.dtype == torch.float32 for tensor in kept)
    exact = copy.deepcopy(module).double().states(hidden.detach().double())
    assert (states - exact).norm() <= 4 * torch.finfo(torch.bfloat16).eps * exact.norm()


def test_token_weights_are_those_of_the_sum(generator: Generator) -> None:
    module = trained(generator, token_weights=True)
    hidden = draw_hidden(generator, 2, 3, 5)
    mask = torch.rand(2, 3, 5, generator=generator) < 0.7
    states = module.states(hidden, mask)
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    weight = torch.sigmoid(normed @ module.token_gate) * mask
    weighed = normed * module.norm_weight
    moments = torch.einsum("btm,btmi,btmj->btij", weight, weighed, weighed).cumsum(1)
    wanted = module.value_projection @ moments @ module.key_projection
    torch.testing.assert_close(states, wanted, rtol=1e-10, atol=1e-10 * wanted.abs().max().item())


def test_the_delta_rule_replaces_what_the_state_says_about_a_key(generator: Generator) -> None:
    module = trained(generator, delta_rule=True)
    hidden, initial = draw_hidden(generator, 2, 3, 5), torch.randn(2, 8, 8, generator=generator).double()
    states = module.states(hidden, initial_state=initial)
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    strength = torch.sigmoid(normed @ module.token_gate)
    values = normed * module.norm_weight @ module.value_projection.mT
    keys = normed * module.norm_weight @ module.key_projection
    keys = keys / keys.norm(dim=-1, keepdim=True)
    state = initial
    for t in range(3):
        for m in range(5):
            v, k = values[:, t, m, :, None], keys[:, t, m, :, None]
            state = state + strength[:, t, m, None, None] * (v - state @ k) @ k.mT
        torch.testing.assert_close(states[:, t], state, rtol=1e-10, atol=1e-10)
    assert "delta_rule" in repr(module)


def test_the_delta_rule_learns_from_the_start_and_excludes_token_weights(generator: Generator) -> None:
    module = build(delta_rule=True)
    with torch.no_grad():
        module.output_map.copy_(torch.eye(14, 8))
    a, b, _ = module(draw_hidden(generator, 1, 2, 20).float())
    (b @ a).square().sum().backward()
    assert module.token_gate.grad.abs().max() > 0
    with pytest.raises(InputError, match="token_weights must be false with delta_rule"):
        build(delta_rule=True, token_weights=True)


def test_untrained_token_weights_change_no_adapter_and_learn(generator: Generator) -> None:
    hidden = draw_hidden(generator, 1, 2, 20).float()
    plain, weighed = build(), build(token_weights=True)
    weighed.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for module in (plain, weighed):
            module.output_map.copy_(torch.eye(14, 8))
    (a, b, _), (c, d, _) = plain(hidden), weighed(hidden)
    torch.testing.assert_close(b @ a, d @ c, rtol=1e-4, atol=1e-5)
    (d @ c).square().sum().backward()
    assert weighed.token_gate.grad.abs().max() > 0
    assert plain.token_gate is None
    assert "token_weights" in repr(weighed)
