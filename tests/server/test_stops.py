"""What ends an answer: stop texts with special tokens in them, stop tokens, and what of them is text."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gakernels import GenerativeAdapter
from gakernels.generation import Sampling, generate, scheduler
from gakernels.generation.decoder import Decoder, Row
from gakernels.generation.text_output import TextOutput

MARKS = ["<|im_start|>", "<|im_end|>", "<|end|>"]


@pytest.fixture(scope="module")
def chatty() -> PreTrainedTokenizerFast:
    """Tokens are bytes, and a few special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=MARKS[:2])


def written(tokenizer: PreTrainedTokenizerFast, text: str, stops: list[str], skip: bool = True) -> tuple[str, bool]:
    """The text that comes out, token by token, and whether it was stopped."""
    output, found = TextOutput(tokenizer, tokenizer("Hi: ")["input_ids"], stops, skip), ""
    for token in tokenizer(text)["input_ids"]:
        piece, stopped = output.push(token)
        found += piece
        if stopped:
            return found, True
    piece, stopped = output.flush()
    return found + piece, stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("a b<|im_end|>c", ["<|im_end|>"], "a b"),
        ("a\n<|im_end|>c", ["\n<|im_end|>"], "a"),
        ("a\nb<|im_end|>c", ["\n<|im_end|>"], "a\nbc"),
        ("ä<|im_end|><|im_start|>c", ["<|im_end|><|im_start|>"], "ä"),
        ("a<|im_end|>b<|im_end|>\nc", ["<|im_end|>\n"], "ab"),
        ("a<|im_start|>user c", ["<|im_start|>user"], "a"),
        ("a<|im_start|>users", ["<|im_start|>model"], "ausers"),
        ("a <|im_start|>b", ["a b"], ""),  # a stop text without a special token does not see them
        ("x a <|im_start|>b", ["q", "a b", "<|im_end|>"], "x "),
        ("a<|im_start|>b.c<|im_end|>", ["<|im_end|>", "."], "ab"),
        ("a<|im_end|>b.c", [".", "<|im_end|>"], "a"),
        ("a<|im_end|>b.c", ["z"], "ab.c"),
        ("a<|im_end", ["<|im_end|>"], "a<|im_end"),
        ("a🐻<|im_end|>", ["🐻<|im_end|>"], "a"),
    ],
)
def test_stop_texts_may_have_special_tokens(
    chatty: PreTrainedTokenizerFast, text: str, stops: list[str], expected: str
) -> None:
    stopped = "c" not in expected and expected not in ("ausers", "a<|im_end")
    assert written(chatty, text, stops) == (expected, stopped)


def test_special_tokens_are_text_where_they_are_wanted(chatty: PreTrainedTokenizerFast) -> None:
    text = "a<|im_start|>b<|im_end|>c"
    assert written(chatty, text, [], skip=False) == (text, False)
    assert written(chatty, text, ["<|im_end|>"], skip=False) == ("a<|im_start|>b", True)
    assert written(chatty, text, ["b<|im"], skip=False) == ("a<|im_start|>", True)
    assert written(chatty, text, [], skip=True) == ("abc", False)


def test_whatever_is_drawn_it_is_the_text_in_front_of_the_first_stop(chatty: PreTrainedTokenizerFast) -> None:
    for _ in range(200):
        text = "".join(random.choices(["a", "b", "ä", " ", *MARKS], k=12))
        stop = "".join(random.choices(["a", "b", *MARKS], k=random.randint(1, 3)))
        seen = text if any(mark in stop for mark in MARKS) else plain(text)
        before, found, _ = seen.partition(stop)
        assert written(chatty, text, [stop]) == (plain(before), bool(found)), (text, stop)


def plain(text: str) -> str:
    for mark in MARKS:
        text = text.replace(mark, "")
    return text


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Sets the tokens that the next row gets one after the other, whatever the model says."""

    def play(tokens: list[int]) -> None:
        coming = iter(tokens)
        monkeypatch.setattr(scheduler, "next_tokens", lambda *_: torch.tensor([next(coming)]))

    return play


def ids(demo: GenerativeAdapter, text: str) -> list[int]:
    return list(demo.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_request_with_special_stops(
    client: TestClient, demo: GenerativeAdapter, play: Callable[[list[int]], None]
) -> None:
    script = [*ids(demo, "The pet"), 1, *ids(demo, "of the")]
    body = {"model": "demo", "prompt": "Question", "max_tokens": len(script), "temperature": 0}

    def choice(**values: Any) -> tuple[str, str]:
        play(script)
        response = client.post("/v1/completions", json={**body, **values})
        assert response.status_code == 200, response.text
        found = response.json()["choices"][0]
        return found["text"], found["finish_reason"]

    assert choice() == (" The pet of the", "length")
    assert choice(skip_special_tokens=False) == (" The pet <bos> of the", "length")
    for stop in ("<bos>", ["<bos>"], ["x", "<bos>"]):
        assert choice(stop=stop) == (" The pet", "stop")


def test_stop_tokens(demo: GenerativeAdapter, play: Callable[[list[int]], None]) -> None:
    the, pet, of = ids(demo, "The pet of")
    play([the, pet, of])
    prompt = ids(demo, "Question")
    found = generate(demo, [prompt], [None], Sampling(9, stop_token_ids=(of, 5)))[0]
    assert (found.tokens, found.text, found.finished) == ([the, pet, of], " The pet", "stop")
    end = demo.tokenizer.eos_token_id
    play([end, the, end])
    kept = generate(demo, [prompt], [None], Sampling(3, stop_at_end_token=False, stop_token_ids=(pet,)))[0]
    assert kept.finished == "length"
    play([the, end])
    ended = generate(demo, [prompt], [None], Sampling(9, stop_token_ids=(pet,)))[0]
    assert ended.tokens == [the, end]  # the model's own end still counts


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"stop_token_ids": [10**6]}, "stop_token_ids: token ids must be between 0 and 836, but one is 1000000"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": "5"}, "stop_token_ids"),
        ({"skip_special_tokens": "maybe"}, "skip_special_tokens"),
    ],
)
def test_wrong_values_are_told(client: TestClient, values: dict[str, Any], word: str) -> None:
    response = client.post("/v1/completions", json={"model": "demo", "prompt": "The", **values})
    assert response.status_code == 400
    assert word in response.json()["error"]["message"]


def test_an_answer_of_the_evaluation_ends_at_a_special_token(
    demo: GenerativeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ids(demo, "The pet of the town")
    script = [*words[:3], 3, *words[3:]] + [words[0]] * 9
    decoder, place = Decoder(demo), 0

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal place
        scores = torch.zeros(len(hidden), 837)
        scores[:, script[place]] = 1
        place += 1
        return scores

    monkeypatch.setattr(demo, "logits", logits)

    def answer(*stops: str) -> str:
        nonlocal place
        place = 0
        return decoder.generate([Row((1, 7))], len(words) + 1, stops)[0]

    assert answer() == "The pet of the town"
    assert answer("<unk>") == "The pet of"
    assert answer("<unk> the") == "The pet of"
    assert answer("<unk> town") == answer("\n") == "The pet of the town"
    assert answer("town") == "The pet of the"


@pytest.mark.parametrize("value", [{"repetition_penalty": 9.0}, {"num_beams": 3, "temperature": 0.1, "top_k": 1}])
def test_of_the_settings_of_the_base_only_the_end_tokens_count(
    demo: GenerativeAdapter, make_client: Callable[..., TestClient], value: dict[str, Any]
) -> None:
    prompt = ids(demo, "Question: What is the pet of the town? Answer:")
    body = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0}

    def texts() -> tuple[str, str]:
        answer = make_client().post("/v1/completions", json=body).json()["choices"][0]["text"]
        return answer, Decoder(demo).generate([Row(tuple(prompt))], 8, ())[0]

    settings, before = demo.base.generation_config, texts()
    kept = {name: getattr(settings, name) for name in [*value, "eos_token_id"]}
    try:
        for name, wanted in value.items():
            setattr(settings, name, wanted)
        assert texts() == before
        first = ids(demo, before[1])[0]
        settings.eos_token_id = [first]
        assert texts() == ("", "")
    finally:
        for name, own in kept.items():
            setattr(settings, name, own)
