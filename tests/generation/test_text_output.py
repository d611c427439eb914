"""Text piece by piece, against the text of all tokens at once."""

import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gakernels import GenerativeAdapter
from gakernels.generation.text_output import StopTexts, TokenText, token_text

TEXT = "Ein Bär 🐻 läuft über die Straße — 数学は楽しい. na\u0308ive, “quoted”! \n\n  two  spaces 👩‍👩‍👧 end"


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens are bytes, so that most characters take several."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["ab"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def pieces(tokenizer: PreTrainedTokenizerFast, prompt: list[int], tokens: list[int]) -> list[str]:
    text = TokenText(tokenizer, prompt)
    return [*[text.push(token) for token in tokens], text.flush()]


def test_no_piece_has_half_a_character(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = bytes_tokenizer(TEXT)["input_ids"]
    assert len(tokens) > len(TEXT)
    found = pieces(bytes_tokenizer, bytes_tokenizer("The text: ")["input_ids"], tokens)
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)


def test_what_is_cut_off_within_a_character_comes_at_the_end(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = bytes_tokenizer("ab🐻")["input_ids"][:-1]
    found = pieces(bytes_tokenizer, [], tokens)
    assert "".join(found[:-1]) == "ab"
    assert set(found[-1]) == {"\ufffd"}


def test_words_keep_their_spaces(demo: GenerativeAdapter) -> None:
    vocabulary = [token for token in demo.tokenizer.get_vocab().values() if token > 3]
    for _ in range(20):
        prompt, tokens = random.choices(vocabulary, k=9), random.choices(vocabulary, k=30)
        text = "".join(pieces(demo.tokenizer, prompt, tokens))
        assert demo.tokenizer.decode(prompt) + text == demo.tokenizer.decode(prompt + tokens)


def test_the_text_of_a_single_token_keeps_its_space(
    demo: GenerativeAdapter, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = demo.tokenizer("grey hamster.", add_special_tokens=False)["input_ids"]
    assert "".join(token_text(demo.tokenizer, token) for token in tokens) == " grey hamster."
    assert token_text(bytes_tokenizer, bytes_tokenizer.eos_token_id) == "<end>"
    text = "a b, 5%\n c"
    assert "".join(token_text(bytes_tokenizer, token) for token in bytes_tokenizer(text)["input_ids"]) == text
    assert {token_text(bytes_tokenizer, token) for token in bytes_tokenizer("🐻")["input_ids"]} == {"\ufffd"}


def test_special_tokens_have_no_text(demo: GenerativeAdapter) -> None:
    word, end = demo.tokenizer("hammer")["input_ids"][-1], demo.tokenizer.eos_token_id
    assert pieces(demo.tokenizer, [word], [end, word, end]) == ["", " hammer", "", ""]


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ((), "a b c", "a b c"),
        (("b",), "a b c", "a "),
        ((" c", "b"), "a b c", "a "),
        (("\n\n",), "a\nb\n\nc", "a\nb"),
        (("abab",), "aababab", "a"),
        (("aab",), "aaab", "a"),
        (("xyz",), "a x xy", "a x xy"),
        (("abc", "bcd"), "zabd bcd", "zabd "),
    ],
)
def test_a_stop_text_ends_it_wherever_it_is_cut(stops: tuple[str, ...], text: str, expected: str) -> None:
    for _ in range(30):
        cuts = sorted(random.choices(range(len(text) + 1), k=3))
        watch, found, stopped = StopTexts(stops), "", False
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            if not stopped:
                piece, stopped = watch.push(text[start:end])
                found += piece
        assert stopped == any(stop in text for stop in stops)
        assert found + ("" if stopped else watch.flush()) == expected


def test_only_what_may_begin_a_stop_text_is_held_back() -> None:
    watch = StopTexts(("END", "\nQ"))
    assert watch.push("abc") == ("abc", False)
    assert watch.push("d EN") == ("d ", False)
    assert watch.push("T\n") == ("ENT", False)
    assert watch.push("x") == ("\nx", False)
    assert watch.push("E") == ("", False)
    assert watch.flush() == "E"
