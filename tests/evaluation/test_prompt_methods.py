"""Prompts that are cut or cached: what is kept of a context, and that caching changes no answer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from invented import make_tokenizer
from tiny import make_model, plain_copy
from transformers import DynamicCache
from worlds import make, run, scenario, text

from gakernels import GenerativeAdapter, InputError
from gakernels.evaluation.answer_log import AnswerLog
from gakernels.evaluation.methods import MethodSettings
from gakernels.evaluation.perplexity import CutDocument, perplexity
from gakernels.evaluation.prompt_methods import CachedPrompt, TruncatedPrompt
from gakernels.evaluation.runner import RunSettings
from gakernels.evaluation.scenarios import Scenario
from gakernels.generation.decoder import Decoder


def cached_by_transformers(model: GenerativeAdapter, tokens: list[int]) -> int:
    """Bytes of the keys and values of a prompt."""
    cache = DynamicCache()
    plain_copy(model)(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_a_cache_is_kept_of_each_context_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, reads = make(), scenario(4), []
    original = Decoder.read_start

    def read_start(self: Decoder, tokens: list[int], *rest: object) -> object:
        reads.append(list(tokens))
        return original(self, tokens, *rest)

    monkeypatch.setattr(Decoder, "read_start", read_start)
    runner = run(model, asked, "prompt_cached", settings=RunSettings(alone=2))
    contexts = [model.tokenizer(case.context.text)["input_ids"] for case in asked.cases]
    # Both probes begin with a word that this tokenizer does not know, so that it is read too; prompts leave it out.
    assert [row[:-1] for row in reads] == contexts
    (cost,) = runner.measured_costs()
    assert cost.stored_bytes == sum(cached_by_transformers(model, row) for row in reads) / 4
    assert cost.contextualization_seconds > 0
    assert cost.first_token_seconds > 0
    assert cost.tokens_per_second > 0


def windows() -> Scenario:
    documents = [text(60).split() for _ in range(3)]
    ids = [[int(word[1:]) for word in words] for words in documents]
    return perplexity(
        [
            CutDocument(f"d{number}", " ".join(words[:30]), tuple(row[:30]), tuple(row[30:]))
            for number, (words, row) in enumerate(zip(documents, ids, strict=True))
        ],
        6,
    )


def test_a_cache_does_not_change_losses() -> None:
    model, asked = make(), windows()
    runner = run(model, asked, "prompt", "prompt_cached")
    plain, cached = (runner.log.answers(name) for name in ("prompt", "prompt_cached"))
    assert plain.keys() == cached.keys()
    for key, (loss, tokens) in plain.items():
        assert cached[key] == (pytest.approx(loss, rel=1e-9), tokens)


def test_a_context_that_does_not_fit_is_read_with_every_question() -> None:
    model, asked = make(), scenario(3)
    long = replace(asked.cases[1].context, text=text(140))  # the model reads 128 tokens
    asked = replace(asked, cases=(asked.cases[0], replace(asked.cases[1], context=long), asked.cases[2]))
    runner = run(model, asked, "prompt", "prompt_cached")
    assert runner.log.answers("prompt_cached") == runner.log.answers("prompt")
    assert [method.truncated for method in runner.method_runs()] == [3, 3]


def test_a_cache_needs_full_attention() -> None:
    model = make_model("mistral", tokenizer=make_tokenizer())
    with pytest.raises(InputError, match="prompt_cached needs a base model without a sliding window"):
        CachedPrompt(model, scenario(1), MethodSettings())


def test_an_interrupted_run_with_a_cache_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, path = make(), scenario(4), tmp_path / "r.json"
    original, calls = Decoder.generate, []

    def generate(self: Decoder, *options: object) -> list[str]:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, *options)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "generate", generate)
        with pytest.raises(KeyboardInterrupt):
            run(model, asked, "prompt_cached", log=AnswerLog(path, {}))
    kept = AnswerLog(path, {}).answers("prompt_cached")
    assert 0 < len(kept) < 12
    runner = run(model, asked, "prompt_cached", log=AnswerLog(path, {}))
    assert runner.log.answers("prompt_cached") == run(model, asked, "prompt").log.answers("prompt")


def test_a_truncated_prompt_takes_the_room_of_an_adapter() -> None:
    model, asked = make(), scenario(2)
    method = TruncatedPrompt(model, asked, MethodSettings())
    adapter = model.adapt([text(9)])[0].to("cpu", model.base.dtype).bytes()
    token = cached_by_transformers(model, [3])
    assert method.tokens == round(adapter / token)
    assert method.tokens_read(10**6) == method.tokens
    assert method.tokens_read(1) == 1


def test_a_truncated_prompt_keeps_the_characters_of_its_tokens() -> None:
    model, asked = make(), scenario(1)
    spaced = replace(asked.cases[0].context, text="  w3  w4\n\nw5 w6 ")
    cases = [replace(asked.cases[0], context=spaced)]
    for last, kept in ((False, "  w3  w4"), (True, "w5 w6 ")):
        prepared = TruncatedPrompt(model, asked, MethodSettings(truncate_to=2), last).prepare(cases)
        assert prepared.in_front(0, "w3") == kept
        assert prepared.kept_bytes() == len(kept)
    whole = TruncatedPrompt(model, asked, MethodSettings(truncate_to=4)).prepare(cases)
    assert whole.in_front(0, "w3") == spaced.text
    with pytest.raises(InputError, match="truncate_to must be at least 1, but it is 0"):
        MethodSettings(truncate_to=0)
