"""Calls that anybody would try work: one context or several, adapters in any form, options of generation."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import logits_of, make_model, random_context, random_ids, same_adapters
from transformers import PreTrainedTokenizerFast

from gakernels import Adapter, GenerativeAdapter, InputError
from gakernels.adapters.quantized_compact import QuantizedCompactAdapter


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> GenerativeAdapter:
    return make_model(tokenizer=tokenizer, scale=2.0)


# One or several contexts


def test_one_context_gives_one_adapter_and_a_list_a_list(model: GenerativeAdapter, text: Callable[[int], str]) -> None:
    document, ids = text(20), random_context(20)
    wanted = model.adapt([document])[0]
    assert isinstance(wanted, Adapter)
    assert same_adapters(model.adapt(document), wanted)
    for one in (ids, tuple(ids), torch.tensor(ids), np.array(ids)):
        assert same_adapters(model.adapt(one), model.adapt([ids])[0])
    for several in ([document, ids], (document, ids), iter([document, ids])):
        assert [adapter.tokens_seen for adapter in model.adapt(several)] == [21, 20]
    assert len(model.adapt(torch.tensor([ids, ids]))) == 2
    with pytest.raises(InputError, match="a text or a sequence of token ids, but it is 7"):
        model.adapt(7)


def test_a_stream_reads_whatever_adapt_reads(model: GenerativeAdapter) -> None:
    ids = random_context(20)
    wanted = model.stream().append(ids).adapter()
    for context in (tuple(ids), torch.tensor(ids), np.array(ids), iter(ids)):
        assert same_adapters(model.stream().append(context).adapter(), wanted)


# Adapters in any form


def test_compact_and_quantised_adapters_are_used_as_they_are(model: GenerativeAdapter, tmp_path: Path) -> None:
    stream, ids = model.stream().append(random_context(20)), random_ids(2, 6)
    compact = stream.compact()
    quantized = QuantizedCompactAdapter.quantize(compact, bits=8)
    for form, plain in ((compact, model.expand(compact)), (quantized, model.expand(quantized.dequantize()))):
        with model.adapted(plain):
            wanted = logits_of(model.base, ids)
        with model.adapted(form):
            assert torch.equal(logits_of(model.base, ids), wanted)
        with model.adapted([form, stream.adapter()]):
            assert torch.equal(logits_of(model.base, ids)[:1], logits_of_one(model, plain, ids[:1]))
        model.merge(form)
        merged = logits_of(model.base, ids)
        model.unmerge()
        torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)
        model.save_merged(form, str(tmp_path / "merged"))
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(logits_of(found, ids), merged, rtol=1e-5, atol=1e-5)


def logits_of_one(model: GenerativeAdapter, adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    with model.adapted([adapter, adapter]):
        return logits_of(model.base, ids.repeat(2, 1))[:1]


# Generation: greedy, unless the caller says otherwise


SETTINGS: dict[str, Any] = {
    "repetition_penalty": 1.8,
    "num_beams": 3,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 40)),
    "max_length": 9,
    "do_sample": True,
    "temperature": 5.0,
    "min_new_tokens": 20,
    "bad_words_ids": [[number] for number in range(3, 40)],
}


@pytest.mark.parametrize("name", [*SETTINGS, "all"])
def test_what_the_base_comes_with_does_not_count(
    model: GenerativeAdapter, text: Callable[[int], str], name: str
) -> None:
    prompts = [text(4), text(9)]
    wanted = model.generate(prompts, max_new_tokens=12)
    settings = SETTINGS if name == "all" else {name: SETTINGS[name]}
    for key, value in settings.items():
        setattr(model.base.generation_config, key, value)
    before = copy.deepcopy(model.base.generation_config)
    assert model.generate(prompts, max_new_tokens=12) == wanted
    assert model.base.generation_config == before


def test_the_end_tokens_of_the_base_count(model: GenerativeAdapter, text: Callable[[int], str]) -> None:
    prompt = text(5)
    ids = torch.tensor([[1, *(int(word[1:]) for word in prompt.split())]])
    first = int(logits_of(model.base, ids)[0, -1].argmax())
    model.base.generation_config.eos_token_id = [first, 60]
    assert model.generate(prompt) == [model.tokenizer.decode([first], skip_special_tokens=True)]
    assert model.end_tokens() == tuple(sorted({2, first, 60}))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "max_new_tokens": 7},
        {"repetition_penalty": 3.0, "max_new_tokens": 7},
        {"max_length": 11},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=7, num_beams=2)},
    ],
    ids=["beams", "penalty", "length", "config"],
)
def test_what_the_caller_says_counts(
    model: GenerativeAdapter, text: Callable[[int], str], options: dict[str, Any]
) -> None:
    prompt = text(5)
    ids = torch.tensor([[1, *(int(word[1:]) for word in prompt.split())]])
    settings = {"eos_token_id": 2, "pad_token_id": 2, **options}
    output = model.base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
    wanted = model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert model.generate(prompt, **options) == [wanted]


def test_lengths_and_results_that_can_not_be_are_refused(model: GenerativeAdapter, text: Callable[[int], str]) -> None:
    with pytest.raises(InputError, match="max_length must be above the 12 tokens of the prompt, but it is 12"):
        model.generate(text(11), max_length=12)
    with pytest.raises(InputError, match="return_dict_in_generate: texts are returned"):
        model.generate(text(3), return_dict_in_generate=True)
    for prompts in ([3, 4], [[3, 4]], torch.tensor([3, 4])):
        with pytest.raises(InputError, match="prompts must be one text or several"):
            model.generate(prompts)
