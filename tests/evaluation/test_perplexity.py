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
from gakernels.bootstrap import ratio_of_perplexities
from gakernels.model.static_lora import StaticLora
from gakernels.training.perplexity import HeldOutContexts, Ratio, TaskPerplexity, context_perplexity

CHUNKS, LENGTH = 3, 6


def double_model() -> GenerativeAdapter:
    return make_model(base_dtype=torch.float64, dtype=torch.float64, chunk_size=LENGTH)


def with_delta(model: GenerativeAdapter, delta: Callable[[str], Tensor]) -> PreTrainedModel:
    base = plain_copy(model)
    for name in model.adapted_names:
        base.get_submodule(name).weight += delta(name)
    return base


def loss_of(base: PreTrainedModel, segment: Tensor) -> float:
    """Of all windows of a row of tokens, by transformers' own loss."""
    with torch.no_grad():
        losses = [base(input_ids=window[None], labels=window[None]).loss for window in segment.view(-1, LENGTH)]
    return float(sum(losses)) * (LENGTH - 1)


def plain_losses(
    model: GenerativeAdapter, contexts: Tensor, scored: Tensor, others: list[int]
) -> dict[str, list[float]]:
    """The loss of each row of `scored` by the name of the adapter."""
    plain = plain_copy(model)
    adapters: list[Adapter] = [model.stream().append(context.tolist()).adapter() for context in contexts]
    adapted = [with_delta(model, adapter.delta) for adapter in adapters]
    return {
        "none": [loss_of(plain, row) for row in scored],
        "own": [loss_of(adapted[number], row) for number, row in enumerate(scored)],
        "other": [loss_of(adapted[others[number]], row) for number, row in enumerate(scored)],
    }


def check(task: TaskPerplexity, losses: dict[str, list[float]], windows: int) -> None:
    tokens = windows * (LENGTH - 1)
    sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()}
    count = len(sums["own"])
    assert task.tokens == count * tokens
    assert set(task.perplexity) == set(losses)
    assert len({round(value, 3) for value in task.perplexity.values()}) == len(losses)
    for name, total in sums.items():
        # Transformers' norms and its own loss round to float32.
        assert task.perplexity[name] == pytest.approx(math.exp(total.sum() / (count * tokens)), rel=1e-5)
    assert set(task.own_over) == set(losses) - {"own"}
    for name, ratio in task.own_over.items():
        low, high = ratio_of_perplexities(sums["own"], sums[name], torch.full((count,), tokens))
        value = math.exp((sums["own"] - sums[name]).sum() / (count * tokens))
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((value, low, high), rel=1e-5)
        assert ratio.low <= ratio.value <= ratio.high


def test_they_equal_a_plain_loop() -> None:
    model, contexts, after = double_model(), random_ids(5, CHUNKS * LENGTH), random_ids(5, 2 * LENGTH)
    lora = StaticLora(model).double()
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    factors = lora.factors()
    control = with_delta(
        model, lambda name: (factors[name].scale * factors[name].lora_b[0] @ factors[name].lora_a[0]).detach()
    )
    others = [3, 3, 3, 4, 0]  # the next one of another document, round and round
    held_out = HeldOutContexts(contexts, after, documents=(7, 7, 7, 2, 5))
    report = context_perplexity(model, held_out, CHUNKS, {"static": factors}, batch_size=2)
    assert (report.contexts, report.context_tokens, report.other_documents) == (5, CHUNKS * LENGTH, True)
    assert report.completion is not None
    for task, scored in ((report.reconstruction, contexts), (report.completion, after)):
        losses = plain_losses(model, contexts, scored, others)
        losses["static"] = [loss_of(control, row) for row in scored]
        check(task, losses, scored.shape[1] // LENGTH)


def test_without_documents_the_other_context_is_the_next_and_nothing_is_completed() -> None:
    model, contexts = double_model(), random_ids(4, CHUNKS * LENGTH)
    report = context_perplexity(model, HeldOutContexts(contexts), CHUNKS)
    assert not report.other_documents
    assert report.completion is None
    check(report.reconstruction, plain_losses(model, contexts, contexts, [1, 2, 3, 0]), CHUNKS)


def test_a_static_term_alone_is_the_adapter_of_an_empty_context() -> None:
    model = make_model(base_dtype=torch.float64, dtype=torch.float64, chunk_size=LENGTH, static_rank=3)
    contexts = random_ids(2, CHUNKS * LENGTH)

    def static_term(name: str) -> Tensor:
        generator = model.generator(name)
        return (model.config.adapter_scale * generator.static_lora_b @ generator.static_lora_a).detach()

    alone = with_delta(model, static_term)
    report = context_perplexity(model, HeldOutContexts(contexts), CHUNKS)
    losses = plain_losses(model, contexts, contexts, [1, 0])
    check(report.reconstruction, {**losses, "empty": [loss_of(alone, row) for row in contexts]}, CHUNKS)


def test_the_batch_size_does_not_matter() -> None:
    model, held_out = double_model(), HeldOutContexts(random_ids(5, CHUNKS * LENGTH), random_ids(5, LENGTH))
    one, all_of_them = (context_perplexity(model, held_out, CHUNKS, batch_size=size) for size in (1, 9))
    for task in ("reconstruction", "completion"):
        for name, value in getattr(one, task).perplexity.items():
            assert getattr(all_of_them, task).perplexity[name] == pytest.approx(value, rel=1e-6)


def test_a_generator_that_is_not_trained_changes_nothing() -> None:
    model = make_model(trained=False, chunk_size=LENGTH)
    task = context_perplexity(model, HeldOutContexts(random_ids(3, CHUNKS * LENGTH)), CHUNKS).reconstruction
    assert task.perplexity["own"] == task.perplexity["other"] == task.perplexity["none"]
    assert task.own_over["other"] == Ratio(1, 1, 1)


def test_the_model_is_left_without_adapters_or_gradients() -> None:
    model, ids = make_model(chunk_size=LENGTH), random_ids(2, 7)
    before = model.base(input_ids=ids).logits
    held_out = HeldOutContexts(random_ids(3, CHUNKS * LENGTH), random_ids(3, LENGTH))
    context_perplexity(model, held_out, CHUNKS, {"control": StaticLora(model).factors()})
    assert model.base(input_ids=ids).logits.equal(before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_of_absurd_loss_still_has_numbers() -> None:
    model = make_model(chunk_size=LENGTH)
    with torch.no_grad():
        model.base.get_output_embeddings().weight *= 1e6
    task = context_perplexity(model, HeldOutContexts(random_ids(2, CHUNKS * LENGTH)), CHUNKS).reconstruction
    assert task.perplexity["none"] == math.exp(700)
    assert math.isfinite(task.own_over["none"].value)


@pytest.mark.parametrize(
    ("shape", "after", "documents", "chunks", "message"),
    [
        ((1, 12), None, None, 2, r"contexts must be at least two.*but there are 1"),
        ((3, 12), (2, 6), None, 2, r"continuations must be one for each of the 3 contexts, but there are 2"),
        ((3, 12), None, (1, 2), 2, r"documents must be one for each of the 3 contexts, but there are 2"),
        ((3, 12), None, (4, 4, 4), 2, r"documents must be at least two, .* but all contexts are of one"),
        ((3, 12), None, None, 5, r"chunks must divide the 12 tokens of a context .*, but is 5"),
        ((3, 12), None, None, 12, r"chunks must divide the 12 tokens of a context .*, but is 12"),
        ((3, 12), (3, 8), None, 2, r"continuations must be of whole windows of 6 tokens, but have 8"),
        ((3, 12), (3, 0), None, 2, r"continuations must be of whole windows of 6 tokens, but have 0"),
    ],
)
def test_contexts_that_can_not_be_scored_are_refused(
    shape: tuple[int, int],
    after: tuple[int, int] | None,
    documents: tuple[int, ...] | None,
    chunks: int,
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        context_perplexity(
            make_model(),
            HeldOutContexts(random_ids(*shape), None if after is None else random_ids(*after), documents),
            chunks,
        )


def test_the_report_is_plain_json() -> None:
    held_out = HeldOutContexts(random_ids(2, CHUNKS * LENGTH), random_ids(2, LENGTH), (0, 1))
    report = context_perplexity(make_model(chunk_size=LENGTH), held_out, CHUNKS)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["contexts"] == 2
    assert values["reconstruction"]["perplexity"] == report.reconstruction.perplexity
    assert values["completion"]["own_over"]["other"]["low"] == report.completion.own_over["other"].low
