"""Drawing tokens: the distribution, its restrictions, and that a row's numbers are its own."""

import pytest
import torch
from torch import Tensor

from gakernels import InputError
from gakernels.generation import Sampling
from gakernels.generation.sampling import draw, next_tokens

VOCABULARY = 12


def even(count: int) -> Tensor:
    """Numbers that are spread evenly over [0, 1): they give every token as often as its probability says."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def frequencies(logits: Tensor, sampling: Sampling, count: int = 20_000) -> Tensor:
    tokens = draw(logits.expand(count, -1), [sampling] * count, even(count))
    return torch.bincount(tokens, minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    logits = 2 * torch.randn(VOCABULARY)
    expected = torch.softmax(logits.double() / temperature, -1)
    assert (frequencies(logits, Sampling(temperature=temperature)) - expected).abs().max() < 1e-3


def test_top_k_draws_from_the_k_most_likely() -> None:
    logits = 2 * torch.randn(VOCABULARY)
    expected = torch.softmax(logits.double(), -1)
    expected[expected < expected.sort(descending=True).values[3]] = 0
    found = frequencies(logits, Sampling(temperature=1, top_k=4))
    assert (found - expected / expected.sum()).abs().max() < 1e-3


@pytest.mark.parametrize("top_p", [0.2, 0.7, 0.95])
def test_top_p_draws_from_the_fewest_that_reach_it(top_p: float) -> None:
    logits = 2 * torch.randn(VOCABULARY)
    expected = torch.softmax(logits.double(), -1)
    kept, total = [], 0.0
    for token in expected.argsort(descending=True).tolist():
        if total < top_p:
            kept.append(token)
        total += float(expected[token])
    mask = torch.zeros(VOCABULARY).index_fill(0, torch.tensor(kept), 1)
    found = frequencies(logits, Sampling(temperature=1, top_p=top_p))
    assert (found - expected * mask / (expected * mask).sum()).abs().max() < 1e-3


def test_settings_belong_to_rows() -> None:
    logits = torch.randn(3, VOCABULARY)
    settings = [Sampling(temperature=1, top_k=1), Sampling(temperature=5), Sampling(temperature=1, top_p=1e-9)]
    for uniform in (0.0, 0.4, 1 - 2**-53):
        found = draw(logits, settings, torch.full((3,), uniform, dtype=torch.float64))
        assert found[0] == logits[0].argmax()
        assert found[2] == logits[2].argmax()
    assert found[1] == logits[1].argmin()  # the last number of all gives the least likely token


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_low_temperature_is_greedy_and_not_nan(temperature: float) -> None:
    logits = torch.randn(4, VOCABULARY)
    assert torch.equal(draw(logits, [Sampling(temperature=temperature)] * 4, torch.rand(4).double()), logits.argmax(-1))


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.randn(VOCABULARY)
    logits[3:] = -torch.inf
    assert frequencies(logits, Sampling(temperature=100))[3:].sum() == 0


def test_a_row_draws_the_same_whoever_is_beside_it() -> None:
    logits, hot = torch.randn(5, VOCABULARY), Sampling(temperature=3)

    def tokens(rows: list[int]) -> list[int]:
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        return [token for _ in range(6) for token in next_tokens(logits[rows], [hot] * len(rows), generators).tolist()]

    together = tokens([0, 1, 2, 3, 4])
    assert together[2::5] == tokens([2])
    assert together[4::5] == tokens([1, 4])[1::2]


def test_greedy_rows_need_no_numbers() -> None:
    logits = torch.randn(3, VOCABULARY)
    settings = [Sampling(), Sampling(temperature=1, top_k=1), Sampling()]
    found = next_tokens(logits, settings, [None, torch.Generator(), None])
    assert torch.equal(found, logits.argmax(-1))


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"stop": "."},
        {"stop": ("",)},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"logit_bias": ((3, float("-inf")),)},
        {"logprobs": -1},
        {"prompt_logprobs": True},
    ],
)
def test_wrong_settings_are_refused(values: dict) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        Sampling(**values)
