"""A context pass against a slow one, chunk by chunk with merged weights and plain sums; equivalences between passes."""

from typing import Any

import pytest
import torch
import transformers
from tiny import (
    FAMILIES,
    logits_of,
    make_base,
    make_config,
    make_model,
    make_trained,
    plain_copy,
    random_context,
    random_ids,
)
from torch import Tensor

from gakernels import GenerativeAdapter
from gakernels.model.windows import pad_windows
from gakernels.nn import AdapterGenerator
from gakernels.ops.low_rank_polar.reference import low_rank_polar

WITH_FLOAT64_NORMS = {
    "llama": "LlamaRMSNorm",
    "qwen2": "Qwen2RMSNorm",
    "mistral": "MistralRMSNorm",
    "qwen3": "Qwen3RMSNorm",
    "phi3": "Phi3RMSNorm",
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.fixture(autouse=True)
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms of transformers round to float32 even in a float64 model; these do not."""
    for family, name in WITH_FLOAT64_NORMS.items():
        module = getattr(transformers.models, family)
        norm = getattr(getattr(module, f"modeling_{family}"), name)
        monkeypatch.setattr(norm, "forward", lambda self, x: rms_norm(x, self.weight, self.variance_epsilon))


def float64_model(family: str = "llama", **settings: object) -> GenerativeAdapter:
    return make_model(family, torch.float64, torch.float64, **settings)


class SlowPass:
    """The definition: one chunk after the other, with the adapter of the state so far merged into the weights."""

    def __init__(self, model: GenerativeAdapter) -> None:
        self.model, self.base = model, plain_copy(model)
        self.weights = {name: self.base.get_submodule(name).weight.clone() for name in model.adapted_names}
        self.states = {name: torch.zeros(16, 16, dtype=torch.float64) for name in model.adapted_names}
        self.layer_inputs: dict[int, Tensor] = {}
        for number, layer in enumerate(self.base.get_decoder().layers):
            layer.register_forward_pre_hook(self._keep(number), with_kwargs=True)

    def _keep(self, number: int) -> object:
        def hook(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            self.layer_inputs[number] = args[0] if args else kwargs["hidden_states"]

        return hook

    @torch.no_grad()
    def read(self, ids: list[int], context: bool = True) -> Tensor:
        """Logits (M, vocabulary) of one window; a context window then adds to the states."""
        for name, weight in self.weights.items():
            self.base.get_submodule(name).weight.copy_(weight + self._delta(name))
        logits = logits_of(self.base, torch.tensor([ids]))[0]
        for name in self.states if context else ():
            self.states[name] = self._updated(name)
        return logits

    def _delta(self, name: str) -> Tensor:
        generator, scale = self.model.generator(name), self.model.config.adapter_scale
        static = torch.zeros_like(self.weights[name])
        if generator.static_rank:
            static = scale * generator.static_lora_b @ generator.static_lora_a
        if self.states[name].abs().max() == 0:
            return static
        u, v = low_rank_polar(self.states[name], generator.sketch, 1, generator.damping)
        return static + scale * generator.output_map @ u @ v.T @ generator.input_map

    def _updated(self, name: str) -> Tensor:
        generator, state = self.model.generator(name), self.states[name]
        number = next(int(part) for part in name.split(".") if part.isdigit())
        for token in rms_norm(self.layer_inputs[number][0], torch.ones(()), 1e-6):
            weight = 1.0 if generator.token_gate is None else torch.sigmoid(generator.token_gate @ token)
            value = generator.value_projection @ (token * generator.norm_weight)
            key = generator.key_projection.T @ (token * generator.norm_weight)
            if generator.delta_rule:
                key = key / key.norm()
                value = value - state @ key
            state = state + weight * torch.outer(value, key)
        return state


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference of the states, relative to the largest number of each."""
    assert left.keys() == right.keys()
    return max(((left[name] - right[name]).abs().max() / right[name].abs().max()).item() for name in left)


@pytest.mark.parametrize("settings", [{}, {"static_rank": 2}, {"token_weights": True}, {"delta_rule": True}])
@pytest.mark.parametrize("family", [*WITH_FLOAT64_NORMS, "llama_bias", "llama_tied"])
def test_a_pass_equals_the_slow_definition(family: str, settings: dict[str, Any]) -> None:
    model = float64_model(family, **settings)
    slow = SlowPass(model)
    windows = [random_context(length) for length in (6, 5, 6, 3, 6, 1)]
    expected = [slow.read(window) for window in windows]
    ids, mask = pad_windows([windows], pad=0)
    with torch.no_grad():
        hidden, states = model(ids, mask, 6, range(6))
        logits = model.logits(hidden)[0]
    assert difference({name: state[0] for name, state in states.items()}, slow.states) < 1e-9
    for window, want, got in zip(windows, expected, logits, strict=True):
        assert (got[: len(window)] - want).abs().max() < 1e-9 * want.abs().max()
    # The adapters matter: without them the last window reads otherwise.
    alone = logits_of(plain_copy(model), torch.tensor([windows[4]]))[0]
    assert (expected[4] - alone).abs().max() > 1e-2 * alone.abs().max()


@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("static_rank", [0, 3])
def test_windows_after_the_context_see_the_chunks_that_they_are_told_to(with_initial: bool, static_rank: int) -> None:
    model = float64_model(static_rank=static_rank)
    slow = SlowPass(model)
    before = [random_context(6) for _ in range(2)] if with_initial else []
    context, after = ([random_context(6) for _ in range(4)] for _ in range(2))
    initial = model.states([[token for window in before for token in window]]) if before else None
    seen = [0, 1, 2, 3, 1, 2, 4, 0]
    for window in before:
        slow.read(window)
    expected = {0: slow.read(after[3], context=False)}
    for count, window in enumerate(context, start=1):
        slow.read(window)
        if count in seen[4:]:
            expected[count] = slow.read(after[seen[4:].index(count)], context=False)
    ids, mask = pad_windows([context + after], pad=0)
    with torch.no_grad():
        hidden, states = model(ids, mask, 4, seen, initial)
        logits = model.logits(hidden)[0, 4:]
    assert difference({name: state[0] for name, state in states.items()}, slow.states) < 1e-9
    for count, got in zip(seen[4:], logits, strict=True):
        assert (got - expected[count]).abs().max() < 1e-9 * got.abs().max()


def test_reconstruction_windows_do_not_feed_the_state() -> None:
    model, context = float64_model(), random_ids(1, 3, 6)
    mask = torch.ones(1, 5, 6, dtype=torch.bool)
    with torch.no_grad():
        states = [model(torch.cat([context, random_ids(1, 2, 6)], 1), mask, 3, [0, 1, 2, 3, 1])[1] for _ in range(2)]
        alone = model(context, mask[:, :3], 3, [0, 1, 2])[1]
    assert difference(states[0], alone) < 1e-12
    assert difference(states[1], alone) < 1e-12


def probe(model: GenerativeAdapter, states: dict[str, Tensor], ids: Tensor) -> Tensor:
    with model.adapted(model.adapters(states, [0])):
        return logits_of(model.base, ids)


@pytest.mark.parametrize("norm", ["polar", "frobenius"])
def test_one_pass_over_eight_chunks_equals_eight_appends_in_float64(norm: str) -> None:
    model, context, ids = float64_model(norm=norm), random_context(48), random_ids(2, 9)
    once, stream = model.stream().append(context), model.stream()
    for start in range(0, 48, 6):
        stream.append(context[start : start + 6])
    assert stream.tokens_seen == once.tokens_seen == 48
    assert difference(stream.states(), once.states()) < 1e-9
    left, right = (probe(model, states, ids) for states in (stream.states(), once.states()))
    assert (left - right).abs().max() < 1e-9 * right.abs().max()


def with_last_bits_changed(model: GenerativeAdapter, context: list[int]) -> dict[str, Tensor]:
    """The states of a context when each number of the input embeddings is moved by one ulp, up or down."""
    table = model.base.get_input_embeddings().weight
    exact = table.clone()
    with torch.no_grad():
        table.copy_(torch.nextafter(exact, torch.where(torch.rand_like(exact) < 0.5, -torch.inf, torch.inf)))
        states = model.states([context])
        table.copy_(exact)
    return states


def float32_ratios() -> tuple[float, float]:
    """How far eight appends are from one pass, over how far a change of the last bits is: for states and logits."""
    model, context, ids = make_model(), random_context(48), random_ids(2, 9)
    once, stream = model.states([context]), model.stream()
    for start in range(0, 48, 6):
        stream.append(context[start : start + 6])
    logits = probe(model, once, ids)

    def distances(states: dict[str, Tensor]) -> tuple[float, float]:
        apart = torch.stack([(states[name] - once[name]).norm() / once[name].norm() for name in once])
        return apart.norm().item(), (probe(model, states, ids) - logits).norm().item()

    bounds = [distances(with_last_bits_changed(model, context)) for _ in range(4)]
    by_states, by_logits = distances(stream.states())
    return by_states / max(bound for bound, _ in bounds), by_logits / max(bound for _, bound in bounds)


def test_one_pass_equals_appends_in_float32_within_what_one_ulp_of_the_embeddings_does() -> None:
    """Over five random models, because one rounding or another is the larger by chance."""
    ratios = torch.tensor([float32_ratios() for _ in range(5)])
    assert (ratios.clamp(min=1e-3).log().mean(0).exp() < 1).all()


@pytest.mark.parametrize("chunks_per_pass", [1, 2, 3, 5, 8, 100])
def test_chunks_per_pass_does_not_change_the_result(chunks_per_pass: int) -> None:
    model, contexts = float64_model(), [random_context(length) for length in (48, 13, 30)]
    expected = model.states(contexts, chunks_per_pass=8)
    assert difference(model.states(contexts, chunks_per_pass=chunks_per_pass), expected) < 1e-9


def test_a_batch_of_contexts_of_different_lengths_equals_each_alone() -> None:
    model, contexts = float64_model(), [random_context(length) for length in (48, 1, 13, 6)]
    together = model.states(contexts)
    for row, context in enumerate(contexts):
        alone = model.states([context])
        assert difference({name: state[row : row + 1] for name, state in together.items()}, alone) < 1e-9


def test_initial_states_continue_each_row() -> None:
    model, first, second = float64_model(), [random_context(12), random_context(6)], [random_context(9) for _ in "ab"]
    continued = model.states(second, model.states(first))
    for row in range(2):
        stream = model.stream().append(first[row]).append(second[row])
        assert difference({name: state[row : row + 1] for name, state in continued.items()}, stream.states()) < 1e-9


def test_padding_tokens_and_empty_chunks_change_no_bit() -> None:
    model, chunks = make_model(), [random_context(6), random_context(4), random_context(5)]
    ids, mask = pad_windows([[*chunks, []]], pad=0)
    others = torch.where(mask, ids, random_ids(*ids.shape))
    with torch.no_grad():
        hidden, states = model(ids, mask, 4, range(4))
        other_hidden, other_states = model(others, mask, 4, range(4))
        fewer = model(ids[:, :3], mask[:, :3], 3, range(3))[1]
    assert all(torch.equal(states[name], other_states[name]) for name in states)
    assert torch.equal(hidden[mask], other_hidden[mask])
    assert difference(fewer, states) < 1e-5
    assert not torch.equal(hidden[:, 1], other_hidden[:, 1])  # the padding's own outputs do change


def test_the_first_window_sees_no_adapter_and_later_ones_do() -> None:
    model, ids = make_model(), random_ids(2, 3, 6)
    with torch.no_grad():
        logits = model.logits(model(ids, torch.ones_like(ids, dtype=torch.bool), 3, range(3))[0])
    plain = logits_of(plain_copy(model), ids.flatten(0, 1)).view_as(logits)
    assert (logits[:, 0] - plain[:, 0]).abs().max() < 1e-5
    assert ((logits - plain)[:, 1:].abs().amax((-1, -2)) > 1e-2).all()


def test_a_pass_forgets_the_adapter_in_use_and_gives_it_back() -> None:
    model, context, ids = make_model(), random_context(18), random_ids(1, 9)
    expected = model.states([context])
    with model.adapted(model.adapt([random_context(20)])):
        before = logits_of(model.base, ids)
        states = model.states([context])
        assert torch.equal(logits_of(model.base, ids), before)
    assert all(torch.equal(states[name], expected[name]) for name in expected)


def test_the_same_context_gives_the_same_bits_twice() -> None:
    model, context = make_model(), random_context(40)
    first, second = (model.adapt([context])[0] for _ in range(2))
    assert all(torch.equal(first.lora_a[name], second.lora_a[name]) for name in first.lora_a)
    assert all(torch.equal(first.lora_b[name], second.lora_b[name]) for name in first.lora_b)


def loss(model: GenerativeAdapter, ids: Tensor, mask: Tensor) -> Tensor:
    hidden, _ = model(ids, mask, 3, [0, 1, 2, 3, 1])
    logits = model.logits(hidden)[:, :, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), ids[:, :, 1:].flatten())


@pytest.mark.parametrize("norm", ["polar", "frobenius"])
def test_gradients_reach_every_parameter_and_equal_finite_differences(norm: str) -> None:
    model = float64_model(norm=norm)
    ids, mask = random_ids(2, 5, 6), torch.ones(2, 5, 6, dtype=torch.bool)
    mask[1, 1, 3:] = False
    loss(model, ids, mask).backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    step = 1e-5
    for name, parameter in model.generators.named_parameters():
        assert parameter.grad is not None, name
        place = parameter.grad.abs().flatten().argmax()
        gradient = parameter.grad.flatten()[place].item()
        assert gradient != 0, name
        flat, losses = parameter.detach().view(-1), []
        for shift in (step, -2 * step):
            flat[place] += shift
            losses.append(loss(model, ids, mask).item())
        flat[place] += step
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient, rel=1e-3, abs=1e-8), name


def test_at_the_start_only_the_output_maps_get_gradients() -> None:
    model = make_trained(GenerativeAdapter(make_base(), make_config()))
    for name in model.adapted_names:
        torch.nn.init.zeros_(model.generator(name).output_map)
    ids, mask = random_ids(1, 5, 6), torch.ones(1, 5, 6, dtype=torch.bool)
    loss(model, ids, mask).backward()
    for name, parameter in model.generators.named_parameters():
        assert (parameter.grad.abs().max() > 0) == name.endswith("output_map"), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_in_half_precision_stays_near_float32(family: str) -> None:
    model = make_model(family)
    half = GenerativeAdapter(plain_copy(model).bfloat16(), model.config)
    half.load_generator_tensors(model.generator_tensors(), "the float32 model")
    ids, mask = random_ids(1, 3, 6), torch.ones(1, 3, 6, dtype=torch.bool)
    with torch.no_grad():
        states, rounded = (one(ids, mask, 1, [0, 1, 1])[1] for one in (model, half))
    assert all(state.dtype == torch.float32 for state in rounded.values())
    first = model.adapted_names[0]  # deeper layers see adapters of rounded states
    assert (rounded[first] - states[first]).norm() < 0.05 * states[first].norm()


@pytest.mark.parametrize("seen", [(0, 1, 2, 1, 2, 3), (0, 1, 2, 3), (0, 2, 1)])
def test_the_pass_without_a_graph_changes_nothing(monkeypatch: pytest.MonkeyPatch, seen: tuple[int, ...]) -> None:
    """In training the first window goes ahead alone; the hidden states, states and gradients are those of one pass."""
    model, chunks = float64_model(), 3
    ids, mask = random_ids(2, len(seen), 6), torch.rand(2, len(seen), 1) < 0.8
    mask = mask.expand(-1, -1, 6).clone()
    mask[..., 0] = True
    upstream = torch.randn(2, len(seen), 6, 32, dtype=torch.float64)

    def run() -> list[Tensor]:
        hidden, states = model(ids, mask, chunks, seen)
        total = (hidden * upstream).sum() + sum(state.square().sum() for state in states.values())
        return [hidden, *states.values(), *torch.autograd.grad(total, list(model.generators.parameters()))]

    in_two, passes = run(), []
    model.base.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with monkeypatch.context() as patched:
        patched.setattr("gakernels.model.attached_generators.only_first_is_plain", lambda seen, chunks: False)
        in_one = run()
    assert passes == [2 * len(seen)]
    for value, wanted in zip(in_two, in_one, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)
    run()
    assert passes[1:] == [2, 2 * (len(seen) - 1)]
    with torch.no_grad():
        model(ids, mask, chunks, seen)
    assert passes[3:] == [2 * len(seen)]  # without gradients there is nothing to save


@pytest.mark.parametrize("settings", [{}, {"static_rank": 3}, {"norm": "frobenius", "static_rank": 3}])
@pytest.mark.parametrize(
    ("chunks", "seen"), [(1, (0,)), (1, (0, 1)), (2, (0, 1)), (2, (0, 1, 2, 1)), (3, (0, 1, 2, 3))]
)
def test_what_is_read_gives_the_adapters_of_the_whole_contexts(
    settings: dict[str, object], chunks: int, seen: tuple[int, ...]
) -> None:
    """For further windows, in any order, with the gradients of adapters that are formed anew from the states."""
    model, owner = float64_model(**settings), torch.tensor([1, 0, 1, 1])
    ids = torch.randint(4, 60, (2, len(seen), 7))
    mask = torch.ones_like(ids, dtype=torch.bool)
    hidden, found = model.read(ids, mask, chunks, seen, owner)
    wanted_hidden, states = model(ids, mask, chunks, seen)
    torch.testing.assert_close(hidden, wanted_hidden)
    parameters = [p for p in model.generators.parameters() if p.requires_grad]
    upstream = {name: torch.randn(4, *model.base.get_submodule(name).weight.shape).double() for name in states}

    def products(adapters: dict[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [lora_b[owner] @ lora_a[owner] for lora_a, lora_b in adapters.values()]

    wanted = products({name: model.generator(name).factors(state) for name, state in states.items()})
    given = [f.lora_b[f.adapter_index] @ f.lora_a[f.adapter_index] for f in found.values()]
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-11)

    def gradients(results: list[Tensor]) -> tuple[Tensor | None, ...]:
        total = sum((result * up).sum() for result, up in zip(results, upstream.values(), strict=True))
        return torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)

    torch.testing.assert_close(gradients(given), gradients(wanted), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("static_rank", [0, 3])
@pytest.mark.parametrize("seen", [(0,), (0, 1)])
def test_each_adapter_is_formed_once(monkeypatch: pytest.MonkeyPatch, static_rank: int, seen: tuple[int, ...]) -> None:
    """Even if windows of the pass and further ones use it; the static term alone needs no norm."""
    model, formed = make_model(static_rank=static_rank), 0
    norm_factors = AdapterGenerator.norm_factors

    def counting(generator: AdapterGenerator, states: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal formed
        formed += states.shape[:-2].numel()
        return norm_factors(generator, states)

    monkeypatch.setattr(AdapterGenerator, "norm_factors", counting)
    ids = random_ids(2 * len(seen), 7).unflatten(0, (2, -1))
    model.read(ids, torch.ones_like(ids, dtype=torch.bool), 1, seen, torch.tensor([0, 1, 1]))
    assert formed == 2 * len(model.adapted_names)
