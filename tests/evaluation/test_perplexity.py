"""Perplexities of held-out windows equal a plain loop over contexts and windows."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from tiny import make_model, plain_copy, random_ids
from torch import Tensor
from transformers import PreTrainedModel

from gakernels import Adapter, GenerativeAdapter, InputError
from gakernels.evaluation.bootstrap import ratio_of_perplexities
from gakernels.evaluation.perplexity import context_perplexity
from gakernels.training.static_lora import StaticLora

CHUNKS, LENGTH = 3, 6


def double_model() -> GenerativeAdapter:
    return make_model(base_dtype=torch.float64, dtype=torch.float64, chunk_size=LENGTH)


def with_delta(model: GenerativeAdapter, delta: Callable[[str], Tensor]) -> PreTrainedModel:
    base = plain_copy(model)
    for name in model.adapted_names:
        base.get_submodule(name).weight += delta(name)
    return base


def loss_of(base: PreTrainedModel, segment: Tensor) -> float:
    """Of all windows of a segment, by transformers' own loss."""
    with torch.no_grad():
        losses = [base(input_ids=window[None], labels=window[None]).loss for window in segment.view(CHUNKS, LENGTH)]
    return float(sum(losses)) * (LENGTH - 1)


def test_they_equal_a_plain_loop() -> None:
    model, segments = double_model(), random_ids(5, CHUNKS * LENGTH)
    lora = StaticLora(model).double()
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    factors = lora.factors()
    adapters: list[Adapter] = [model.stream().append(segment.tolist()).adapter() for segment in segments]
    plain = plain_copy(model)
    control = with_delta(
        model, lambda name: (factors[name].scale * factors[name].lora_b[0] @ factors[name].lora_a[0]).detach()
    )
    adapted = [with_delta(model, adapter.delta) for adapter in adapters]
    losses = {
        "none": [loss_of(plain, segment) for segment in segments],
        "own": [loss_of(adapted[number], segment) for number, segment in enumerate(segments)],
        "other": [loss_of(adapted[(number + 1) % 5], segment) for number, segment in enumerate(segments)],
        "static": [loss_of(control, segment) for segment in segments],
    }
    report = context_perplexity(model, segments, CHUNKS, {"static": factors}, batch_size=2)
    scored = CHUNKS * (LENGTH - 1)
    assert set(report.perplexity) == set(losses)
    for name, values in losses.items():
        # Transformers' norms and its own loss round to float32.
        assert report.perplexity[name] == pytest.approx(math.exp(sum(values) / (5 * scored)), rel=1e-5)
    assert len({round(value, 3) for value in report.perplexity.values()}) == 4
    assert (report.contexts, report.tokens) == (5, 5 * scored)
    totals = (torch.tensor(losses[name], dtype=torch.float64) for name in ("own", "other"))
    interval = ratio_of_perplexities(*totals, torch.full((5,), scored))
    assert report.own_over_other == pytest.approx(interval, rel=1e-5)


def test_the_batch_size_does_not_matter() -> None:
    model, segments = double_model(), random_ids(5, CHUNKS * LENGTH)
    one, all_of_them = (context_perplexity(model, segments, CHUNKS, batch_size=size) for size in (1, 9))
    for name, value in one.perplexity.items():
        assert all_of_them.perplexity[name] == pytest.approx(value, rel=1e-6)


def test_a_generator_that_is_not_trained_changes_nothing() -> None:
    model = make_model(trained=False, chunk_size=LENGTH)
    report = context_perplexity(model, random_ids(3, CHUNKS * LENGTH), CHUNKS)
    assert report.perplexity["own"] == report.perplexity["other"] == report.perplexity["none"]
    assert report.own_over_other == (1, 1)


def test_the_model_is_left_without_adapters_or_gradients() -> None:
    model, ids = make_model(chunk_size=LENGTH), random_ids(2, 7)
    before = model.base(input_ids=ids).logits
    context_perplexity(model, random_ids(3, CHUNKS * LENGTH), CHUNKS, {"control": StaticLora(model).factors()})
    assert model.base(input_ids=ids).logits.equal(before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_of_absurd_loss_still_has_a_number() -> None:
    model = make_model(chunk_size=LENGTH)
    with torch.no_grad():
        model.base.get_output_embeddings().weight *= 1e6
    segments = random_ids(2, CHUNKS * LENGTH)
    report = context_perplexity(model, segments, CHUNKS)
    assert report.perplexity["none"] == math.exp(700)


def test_one_context_is_refused() -> None:
    with pytest.raises(InputError, match=r"segments must be at least two.*but there are 1"):
        context_perplexity(make_model(), random_ids(1, 12), 2)


def test_the_report_is_plain_json() -> None:
    report = context_perplexity(make_model(chunk_size=LENGTH), random_ids(2, CHUNKS * LENGTH), CHUNKS)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["own_over_other"] == list(report.own_over_other)
    assert values["perplexity"] == report.perplexity
    assert values["tokens"] == 2 * CHUNKS * (LENGTH - 1)
