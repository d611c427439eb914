"""Penalties and biases against their definition, in float64 and token by token."""

import pytest
import torch
from tiny import VOCABULARY, make_model, random_context
from torch import Tensor

from gakernels import GenerativeAdapter, InputError
from gakernels.generation import Sampling, generate, scheduler
from gakernels.generation.sampling import Adjustment, adjusted


@pytest.fixture
def model() -> GenerativeAdapter:
    return make_model(scale=2.0)


def defined(logits: Tensor, sampling: Sampling, earlier: list[int]) -> list[float]:
    """OpenAI's formula: mu[j] - c[j] * frequency_penalty - float(c[j] > 0) * presence_penalty, and the bias."""
    bias = dict(sampling.logit_bias)
    return [
        mu
        + bias.get(token, 0.0)
        - earlier.count(token) * sampling.frequency_penalty
        - float(earlier.count(token) > 0) * sampling.presence_penalty
        for token, mu in enumerate(logits.double().tolist())
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_are_adjusted_by_the_formula(dtype: torch.dtype) -> None:
    samplings = [
        Sampling(presence_penalty=0.7, frequency_penalty=-0.3, logit_bias=((3, 4.5), (11, -100.0))),
        Sampling(),
        Sampling(frequency_penalty=1.25),
        Sampling(logit_bias=((0, 1e-3),)),
    ]
    device = torch.device("cpu")
    adjustments = [Adjustment(one, VOCABULARY, device) if one.adjusts else None for one in samplings]
    earlier: list[list[int]] = [[] for _ in samplings]
    for _ in range(12):
        logits = (3 * torch.randn(len(samplings), VOCABULARY)).to(dtype)
        before = logits.clone()
        found = adjusted(logits, adjustments)
        assert torch.equal(logits, before)
        expected = torch.tensor(
            [defined(row, *more) for row, *more in zip(logits, samplings, earlier, strict=True)], dtype=torch.float64
        )
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        tokens = torch.randint(0, 6, (len(samplings),))  # few, so that they come again
        for row, adjustment in enumerate(adjustments):
            earlier[row].append(int(tokens[row]))
            if adjustment is not None:
                adjustment.count(tokens[row : row + 1])
    assert adjusted(logits, [None] * len(samplings)) is logits


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_are_decoded_by_the_formula(
    model: GenerativeAdapter, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "runs_ahead", lambda _: ahead)
    prompts = [random_context(length) for length in (4, 9, 2, 6)]
    samplings = [
        Sampling(12, presence_penalty=2.0),
        Sampling(20, frequency_penalty=0.4, logit_bias=((8, 1.0),)),
        Sampling(6),
        Sampling(9, presence_penalty=-1.5),
    ]
    rows = generate(model, prompts, [None] * 4, samplings, max_rows=2)
    for row, sampling in zip(rows, samplings, strict=True):
        with torch.no_grad(), model.using({}):
            logits = model.base(input_ids=torch.tensor([row.prompt + row.tokens])).logits[0]
        for place, token in enumerate(row.tokens):
            right = torch.tensor(
                defined(logits[len(row.prompt) + place - 1], sampling, row.tokens[:place]), dtype=torch.float64
            )
            assert right[token] > right.max() - 1e-4  # up to rounding of the logits themselves
    plain = generate(model, prompts, [None] * 4, Sampling(20))
    assert any(row.tokens != one.tokens[: len(row.tokens)] for row, one in zip(rows, plain, strict=True))


def test_a_drawn_token_follows_the_adjusted_distribution(model: GenerativeAdapter) -> None:
    prompt = random_context(5)
    only = Sampling(4, temperature=1.0, logit_bias=tuple((token, -1e4) for token in range(VOCABULARY) if token != 9))
    assert generate(model, [prompt], [None], only)[0].tokens == [9] * 4
    never = Sampling(4, temperature=50.0, logit_bias=tuple((token, -1e4) for token in range(VOCABULARY // 2)))
    assert min(generate(model, [prompt], [None], never)[0].tokens) >= VOCABULARY // 2


def test_a_bias_of_a_token_that_is_not_there_fails_its_own_row(model: GenerativeAdapter) -> None:
    for token in (VOCABULARY, -1):
        with pytest.raises(InputError, match="logit_bias"):
            generate(model, [[5]], [None], Sampling(2, logit_bias=((token, 1.0),)))
