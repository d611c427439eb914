"""Log-probabilities against transformers' own, on the base model with the adapter merged into its weights."""

import copy
import math

import pytest
import torch
from tiny import VOCABULARY, make_model, random_context
from torch import Tensor

from gakernels import CompactAdapter, GenerativeAdapter
from gakernels.generation import Generation, Sampling, Scheduler, generate, log_probabilities, scheduler
from gakernels.generation.log_probabilities import TokenLogprob


@pytest.fixture
def model() -> GenerativeAdapter:
    return make_model(scale=2.0)


def compact(model: GenerativeAdapter) -> CompactAdapter:
    return model.stream().append(random_context(20)).compact()


def merged_logprobs(model: GenerativeAdapter, tokens: list[int], adapter: CompactAdapter | None) -> Tensor:
    """Log-probabilities (tokens - 1, vocabulary) of what comes behind each token, in float64."""
    other = copy.deepcopy(model)
    if adapter is not None:
        other.merge(other.expand(adapter))
    with torch.no_grad(), other.using({}):
        return torch.log_softmax(other.base(input_ids=torch.tensor([tokens])).logits[0, :-1].double(), -1)


def check(found: list[TokenLogprob], expected: Tensor, tokens: list[int], top: int) -> None:
    assert [one.token for one in found] == tokens
    for one, right in zip(found, expected, strict=True):
        assert abs(one.logprob - right[one.token]) < 1e-4
        assert len(one.top) == top
        assert len({token for token, _ in one.top}) == top
        best = right.topk(top).values if top else []
        for (token, logprob), value in zip(one.top, best, strict=True):
            assert abs(logprob - value) < 1e-4
            assert abs(logprob - right[token]) < 1e-4


@pytest.mark.parametrize("ahead", [False, True])
def test_they_are_those_of_the_merged_model_whatever_is_drawn(
    model: GenerativeAdapter, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "runs_ahead", lambda _: ahead)
    monkeypatch.setattr(log_probabilities, "_BLOCK", 3)
    prompts = [random_context(length) for length in (7, 1, 12, 4, 5)]
    adapters = [compact(model), compact(model), None, compact(model), None]
    twisted = {"temperature": 2.0, "top_k": 9, "presence_penalty": 1.5, "logit_bias": ((5, 3.0), (9, -100.0))}
    samplings = [
        Sampling(6, logprobs=3, prompt_logprobs=True),
        Sampling(9, logprobs=5, prompt_logprobs=True, **twisted),
        Sampling(4, logprobs=0, **twisted),
        Sampling(5),
        Sampling(8, logprobs=VOCABULARY, prompt_logprobs=True, temperature=1.0),
    ]
    rows = generate(model, prompts, adapters, samplings, max_rows=3)
    for row, adapter, sampling in zip(rows, adapters, samplings, strict=True):
        expected = merged_logprobs(model, row.prompt + row.tokens, adapter)
        if sampling.logprobs is None:
            assert (row.logprobs, row.prompt_logprobs) == ([], [])
            continue
        start = len(row.prompt) - 1
        check(row.logprobs, expected[start:], row.tokens, sampling.logprobs)
        if sampling.prompt_logprobs:
            assert row.prompt_logprobs[0] == TokenLogprob(row.prompt[0], None)
            check(row.prompt_logprobs[1:], expected[:start], row.prompt[1:], sampling.logprobs)
        else:
            assert row.prompt_logprobs == []


def test_they_come_with_the_pieces_end_token_included(model: GenerativeAdapter) -> None:
    prompt, adapter, pieces = random_context(5), compact(model), []
    free = generate(model, [prompt], [adapter], Sampling(6))[0]
    end = free.tokens[3]
    row = Generation(prompt, Sampling(6, logprobs=1), adapter, end_tokens=[end], on_piece=pieces.append)
    scheduler.run(Scheduler(model), [row])
    assert [piece.logprob for piece in pieces] == row.logprobs
    assert [one.token for one in row.logprobs] == row.tokens == free.tokens[: free.tokens.index(end) + 1]
    assert all(one.top[0] == (one.token, one.logprob) for one in row.logprobs)  # greedy


def test_nobody_else_pays_for_them(model: GenerativeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("nobody has asked for it")

    for name in ("Scores", "prompt_scores", "Adjustment"):
        monkeypatch.setattr(scheduler, name, forbidden)
    kinds, next_tokens = [], scheduler.next_tokens
    given = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: kinds.append(given(hidden)) or kinds[-1])

    def watched(logits: Tensor, *others: object) -> Tensor:
        assert logits is kinds[-1]  # the model's own, not a copy
        return next_tokens(logits, *others)

    monkeypatch.setattr(scheduler, "next_tokens", watched)
    rows = generate(model, [random_context(4), random_context(6)], [None, None], [Sampling(5), Sampling(4, 1.0)])
    assert [len(row.tokens) for row in rows] == [5, 4]
    assert all(len(logits) <= 2 for logits in kinds)  # those of the last columns only


def test_a_token_that_is_impossible_has_minus_infinity(
    model: GenerativeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.full((1, VOCABULARY), -math.inf)
    logits[0, 7] = 0.0
    monkeypatch.setattr(model, "logits", lambda _: logits)
    found = generate(model, [[5]], [None], Sampling(1, logprobs=2))[0].logprobs[0]
    assert (found.token, found.logprob, found.top[0]) == (7, 0.0, (7, 0.0))
    assert found.top[1][1] == -math.inf
