"""Generation with adapters: transformers' `generate` with its cache against plain decoding, batches against rows."""

from collections.abc import Callable

import pytest
import torch
from tiny import logits_of, make_model, plain_copy, random_context, random_ids
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gakernels import GenerativeAdapter, InputError

FAMILIES = ["llama", "mistral", "qwen2", "gemma2", "gpt_neox"]


def without_cache(model: GenerativeAdapter, prompt: Tensor, steps: int) -> Tensor:
    """Greedy decoding by a whole forward pass per token."""
    ids = prompt[None]
    for _ in range(steps):
        ids = torch.cat([ids, logits_of(model.base, ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :]


def with_cache(model: GenerativeAdapter, prompts: Tensor, steps: int, **options: object) -> Tensor:
    mask = options.pop("attention_mask", torch.ones_like(prompts))
    settings = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0, **options}
    output = model.base.generate(input_ids=prompts, attention_mask=mask, **settings)
    return output[:, prompts.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_the_cache_equals_decoding_without(family: str) -> None:
    model, prompts = make_model(family, scale=2.0), random_ids(3, 5)
    with model.adapted(model.adapt([random_context(20)])):
        found = with_cache(model, prompts, 12)
        expected = torch.stack([without_cache(model, prompt, 12) for prompt in prompts])
    assert torch.equal(found, expected)
    assert not torch.equal(found, with_cache(model, prompts, 12))  # the adapter matters


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    length = max(map(len, prompts))
    rows = [([0] * (length - len(row)) + row, [0] * (length - len(row)) + [1] * len(row)) for row in prompts]
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([mask for _, mask in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_adapter_per_row_equals_each_row_alone(family: str) -> None:
    model = make_model(family, scale=2.0)
    prompts = [random_context(length) for length in (4, 9, 1, 6)]
    adapters = model.adapt([random_context(length) for length in (20, 7, 33, 12)])
    ids, mask = left_padded(prompts)
    with model.adapted(adapters):
        found = with_cache(model, ids, 8, attention_mask=mask)
    for row, adapter in enumerate(adapters):
        with model.adapted(adapter):
            assert torch.equal(found[row], without_cache(model, torch.tensor(prompts[row]), 8)), row


def test_each_of_several_adapters_serves_consecutive_rows() -> None:
    model, ids = make_model(), random_ids(6, 5)
    adapters = model.adapt([random_context(20), random_context(20)])
    with model.adapted(adapters):
        found = logits_of(model.base, ids)
    for row in range(6):
        with model.adapted(adapters[row // 3]):
            assert (found[row] - logits_of(model.base, ids[row : row + 1])[0]).abs().max() < 1e-4


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_stay_with_the_adapter_of_their_prompt(options: dict[str, int]) -> None:
    model, prompts = make_model(scale=2.0), random_ids(2, 5)
    adapters = model.adapt([random_context(20), random_context(20)])
    with model.adapted(adapters):
        found = with_cache(model, prompts, 6, **options)
    each = options.get("num_return_sequences", 1)
    for row, adapter in enumerate(adapters):
        with model.adapted(adapter):
            alone = with_cache(model, prompts[row : row + 1], 6, **options)
        assert torch.equal(found[row * each : (row + 1) * each], alone)


def test_sampled_sequences_of_one_prompt_use_its_adapter() -> None:
    model, prompts = make_model(scale=2.0), random_ids(2, 5)
    adapters = model.adapt([random_context(20), random_context(20)])
    with model.adapted(adapters):
        found = with_cache(model, prompts, 6, do_sample=True, top_k=1, num_return_sequences=2)
    for row in range(4):
        with model.adapted(adapters[row // 2]):
            assert torch.equal(found[row], without_cache(model, prompts[row // 2], 6))


def test_generate_continues_texts_of_different_lengths(
    tokenizer: PreTrainedTokenizerFast, text: Callable[[int], str]
) -> None:
    model, prompts = make_model(tokenizer=tokenizer, scale=2.0), [text(3), text(11)]
    adapters = model.adapt([text(20), text(20)])
    with model.adapted(adapters):
        found = model.generate(prompts, max_new_tokens=7)
    for prompt, adapter, answer in zip(prompts, adapters, found, strict=True):
        ids = torch.tensor([tokenizer.bos_token_id, *[int(word[1:]) for word in prompt.split()]])
        with model.adapted(adapter):
            expected = without_cache(model, ids, 7)
            assert model.generate(prompt, max_new_tokens=7) == [answer]
        ends = (expected == tokenizer.eos_token_id).nonzero().flatten().tolist()
        expected = expected[: min(ends, default=len(expected))]
        words = [f"w{int(token)}" for token in expected if int(token) > 2]
        assert [word for word in answer.split() if word != "<unk>"] == words
    assert tokenizer.pad_token is None  # the caller's tokenizer is left alone


def test_generate_stops_at_the_end_token_and_leaves_it_out(
    tokenizer: PreTrainedTokenizerFast, text: Callable[[int], str]
) -> None:
    model, prompts = make_model(tokenizer=tokenizer), [text(4), text(4)]
    long = model.generate(prompts[0], max_new_tokens=5)[0]
    ids = [tokenizer.bos_token_id, *[int(word[1:]) for word in prompts[0].split()]]
    end = int(without_cache(model, torch.tensor(ids), 1))
    assert end <= 2 or long.split()[0] == tokenizer.decode([end])  # special tokens are left out of the text
    # With the first token as the end token the first row stops at once and is padded while the second goes on.
    answers = model.generate(prompts, max_new_tokens=5, eos_token_id=end)
    assert set(answers[0].split()) <= {tokenizer.decode([end])}


def test_adapters_nest_and_are_restored_also_after_an_error() -> None:
    model, ids = make_model(), random_ids(1, 6)
    outer, inner = model.adapt([random_context(20), random_context(20)])
    plain = logits_of(model.base, ids)
    assert (plain - logits_of(plain_copy(model), ids)).abs().max() < 1e-5
    with model.adapted(outer):
        with_outer = logits_of(model.base, ids)
        with pytest.raises(InputError), model.adapted(inner):
            model.stream().append([])
        with model.adapted(inner):
            with_inner = logits_of(model.base, ids)
        assert torch.equal(logits_of(model.base, ids), with_outer)
        with pytest.raises(InputError):
            model.stream().append([])
        assert torch.equal(logits_of(model.base, ids), with_outer)
    assert torch.equal(logits_of(model.base, ids), plain)
    assert all((one - other).abs().max() > 1e-2 for one, other in ((plain, with_outer), (with_outer, with_inner)))
