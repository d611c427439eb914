"""Fine-tuning equals plain training loops, and leaves the base model as it was."""

from collections.abc import Callable

import pytest
import torch
from invented import make_tokenizer
from tiny import make_model, plain_copy, random_context
from transformers import PreTrainedModel

from gakernels import GenerativeAdapter, InputError
from gakernels.evaluation.tuned_methods import TuningExample, TuningSettings, tune_full, tune_lora, weights_in_force
from gakernels.model.static_lora import StaticLora


def make(family: str = "llama") -> GenerativeAdapter:
    return make_model(family, tokenizer=make_tokenizer())


def examples_of(count: int) -> list[TuningExample]:
    return [TuningExample(tuple(random_context(4 + number % 5)), 1 + number % 3) for number in range(count)]


def loss_of(base: PreTrainedModel, examples: list[TuningExample]) -> torch.Tensor:
    """The mean over all learned tokens, one example at a time."""
    total, tokens = torch.zeros(()), 0
    for example in examples:
        labels = torch.tensor([[-100] * example.start + list(example.tokens[example.start :])])
        loss = base(input_ids=torch.tensor([example.tokens]), labels=labels, use_cache=False).loss
        count = len(example.tokens) - example.start
        total, tokens = total + loss * count, tokens + count
    return total / tokens


def one_step(parameters: list[torch.nn.Parameter], loss: Callable[[], torch.Tensor], rate: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    loss().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "gemma"])
def test_a_step_on_all_weights_is_that_of_a_plain_model(family: str) -> None:
    model, examples = make(family), examples_of(5)
    plain = plain_copy(model).requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.base.named_parameters()}
    tuned = tune_full(model, examples, TuningSettings(1e-2, 1, 5))
    one_step(list(plain.parameters()), lambda: loss_of(plain, examples), 1e-2)
    expected = dict(plain.named_parameters())
    assert set(tuned) == set(expected)
    for name, weight in tuned.items():
        # Adam moves every weight by the learning rate, in the direction of a gradient that may be all but zero.
        moved = (weight - before[name]).abs().max()
        assert moved <= 1.1e-2
        different = ((weight - expected[name]).abs() > 1e-3).float().mean()
        assert different < 0.02, (name, different)
    for name, parameter in model.base.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad


def test_tuned_weights_are_in_force_in_a_block_and_gone_after_it() -> None:
    model = make()
    ids = torch.tensor([random_context(9)])
    before = model.base(input_ids=ids, use_cache=False).logits
    tuned = tune_full(model, examples_of(4), TuningSettings(1e-2, 2, 2))
    plain = plain_copy(model)
    plain.load_state_dict({**plain.state_dict(), **tuned})
    with weights_in_force(model, tuned):
        inside = model.base(input_ids=ids, use_cache=False).logits
    assert torch.allclose(inside, plain(input_ids=ids, use_cache=False).logits, atol=1e-5)
    assert not torch.allclose(inside, before, atol=1e-3)
    assert torch.equal(model.base(input_ids=ids, use_cache=False).logits, before)


def test_a_lora_step_is_that_of_adamw_on_its_factors() -> None:
    model, examples = make(), examples_of(5)
    torch.manual_seed(1)
    lora = StaticLora(model)
    tuned = tune_lora(model, examples, TuningSettings(1e-2, 1, 5))

    def loss() -> torch.Tensor:
        total, tokens = torch.zeros(()), 0
        for example in examples:
            ids = torch.tensor([example.tokens])
            with model.using(lora.factors()):
                logits = model.base(input_ids=ids, use_cache=False).logits[0, example.start - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[0, example.start :], reduction="sum")
            tokens += len(example.tokens) - example.start
        return total / tokens

    one_step(list(lora.parameters()), loss, 1e-2)
    for name, pair in lora.factors().items():
        # lora_B starts at zero, so lora_A gets no gradient in the first step.
        assert torch.equal(tuned[name].lora_a, pair.lora_a.detach())
        different = ((tuned[name].lora_b - pair.lora_b).abs() > 1e-3).float().mean()
        assert different < 0.02
    assert model.base.get_submodule(model.adapted_names[0]).factors is None


@pytest.mark.parametrize("tune", [tune_lora, tune_full])
def test_it_learns_what_it_sees_and_goes_on_from_a_start(tune: Callable) -> None:
    model, examples = make(), examples_of(3)
    settings = TuningSettings(5e-3, 30, 3)
    first = tune(model, examples, settings)
    second = tune(model, examples, settings, (), first)

    def loss(tuned: object) -> float:
        with torch.no_grad():
            if tune is tune_full:
                with weights_in_force(model, tuned):
                    return float(loss_of(model.base, examples))
            with model.using(tuned):
                return float(loss_of(model.base, examples))

    with torch.no_grad():
        base = float(loss_of(model.base, examples))
    assert loss(second) < loss(first) < base


def test_the_same_seed_gives_the_same_weights() -> None:
    model, examples = make(), examples_of(6)
    first, second = (tune_lora(model, examples, TuningSettings(1e-2, 3, 2, seed=5)) for _ in range(2))
    for name, pair in first.items():
        assert torch.equal(pair.lora_b, second[name].lora_b)


def test_the_epoch_with_the_least_validation_loss_counts() -> None:
    model = make()
    examples, validation = examples_of(2), examples_of(6)
    rate = 0.05  # far too high: what is learned by heart soon harms
    best = tune_lora(model, examples, TuningSettings(rate, 12, 2, patience=12), validation)
    by_epoch = [tune_lora(model, examples, TuningSettings(rate, epochs, 2), ()) for epochs in range(1, 13)]

    def loss(factors: object) -> float:
        with torch.no_grad(), model.using(factors):
            return float(loss_of(model.base, validation))

    losses = [loss(factors) for factors in by_epoch]
    assert loss(best) == pytest.approx(min(losses), rel=1e-4)


def test_it_stops_when_the_validation_loss_has_risen_often_enough() -> None:
    model = make()
    examples, validation = examples_of(2), examples_of(6)
    calls = 0
    original = StaticLora.factors

    def counted(self: StaticLora) -> object:
        nonlocal calls
        calls += 1
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StaticLora, "factors", counted)
        tune_lora(model, examples, TuningSettings(0.3, 400, 2, patience=1), validation)
    assert calls < 2 * 400  # a training and a validation batch an epoch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TuningSettings(**{"learning_rate": 1e-3, "epochs": 1, "batch_size": 1, **settings})


def test_no_examples_are_refused_and_the_model_is_as_before() -> None:
    model = make()
    for tune in (tune_lora, tune_full):
        with pytest.raises(InputError, match="at least one example to tune on"):
            tune(model, [], TuningSettings(1e-3, 1, 1))
    assert not any(parameter.requires_grad for parameter in model.base.parameters())
