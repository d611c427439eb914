"""Which tokens of a conversation are answers, against pieces tokenised one by one and against characters."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
import transformers
from chats import (
    CHATML,
    LLAMA_2,
    MARKERS,
    TEMPLATES,
    byte_tokenizer,
    conversation,
    drawn,
    piece_tokenizer,
    sentence,
    word_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from gakernels import InputError
from gakernels.data.chat import ChatEncoder, EncodedConversation, at_time
from gakernels.data.conversations import Message

Pieces = list[tuple[str, bool]]


def encoded(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> EncodedConversation:
    found = ChatEncoder(tokenizer).encode(messages)
    assert isinstance(found, EncodedConversation), found
    return found


def pieces_mistral(messages: list[Message]) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for message in messages:
        if message.role == "user":
            pieces.append((f"[INST] {message.content} [/INST]", False))
        else:
            pieces.append((f" {message.content}</s>", True))
    return pieces


def pieces_llama_2(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    system = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n" if messages[0].role == "system" else ""
    for message in messages[1:] if system else messages:
        if message.role == "user":
            pieces.append((f"<s>[INST] {system}{message.content} [/INST]", False))
            system = ""
        else:
            pieces.append((f" {message.content} </s>", True))
    return pieces


def pieces_llama_3(messages: list[Message]) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for message in messages:
        pieces.append((f"<|start_header_id|>{message.role}<|end_header_id|>\n\n", False))
        pieces.append((f"{message.content}<|eot_id|>", message.role == "assistant"))
    return pieces


def pieces_chatml(messages: list[Message], thought: str = "") -> Pieces:
    pieces: Pieces = []
    for number, message in enumerate(messages):
        before = thought if number == len(messages) - 1 else ""
        pieces.append((f"<|im_start|>{message.role}\n", False))
        pieces += [(f"{before}{message.content}<|im_end|>", message.role == "assistant"), ("\n", False)]
    return pieces


def pieces_thinking(messages: list[Message]) -> Pieces:
    return pieces_chatml(messages, "<think>\n\n</think>\n\n")


def pieces_plain(messages: list[Message]) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for message in messages:
        pieces.append((f"{message.role.capitalize()}:", False))
        pieces.append((f" {message.content}" + ("</s>" * (message.role == "assistant")), message.role == "assistant"))
        pieces.append(("\n", False))
    return pieces


PIECES: dict[str, Callable[[list[Message]], Pieces]] = {
    "mistral": pieces_mistral,
    "llama-2": pieces_llama_2,
    "llama-3": pieces_llama_3,
    "chatml": pieces_chatml,
    "thinking": pieces_thinking,
    "plain": pieces_plain,
}
SYSTEM = {"llama-2", "llama-3", "chatml", "thinking", "plain"}


@pytest.mark.parametrize("kind", PIECES)
def test_answers_are_those_of_the_pieces_of_the_template(kind: str) -> None:
    tokenizer = word_tokenizer(TEMPLATES.get(kind))
    for exchanges in (1, 2, 4):
        messages = conversation(exchanges, system=kind in SYSTEM and drawn(0, 2) == 1)
        found = encoded(tokenizer, messages)
        expected = [
            (token, answer)
            for piece, answer in PIECES[kind](messages)
            for token in tokenizer(piece, add_special_tokens=False)["input_ids"]
        ]
        assert found.tokens.tolist() == [token for token, _ in expected]
        assert found.answers.tolist() == [answer for _, answer in expected]
        assert 0 not in found.tokens.tolist()  # no unknown word: nothing hides behind one


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("make", [byte_tokenizer, piece_tokenizer])
def test_answers_are_the_characters_that_the_model_has_to_write(
    kind: str, make: Callable[[str | None], PreTrainedTokenizerFast]
) -> None:
    tokenizer = make(TEMPLATES.get(kind))
    for exchanges in (1, 3):
        messages = conversation(exchanges, text=True)
        found = encoded(tokenizer, messages)
        pieces = PIECES[kind](messages)
        text = "".join(piece for piece, _ in pieces)
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        answered = [answer for piece, answer in pieces for _ in piece]
        # A token that begins in the prompt and ends in the answer can't be told apart; these templates have none.
        assert all(len({answered[n] for n in range(start, end)}) == 1 for start, end in offsets if end > start)
        assert found.answers.tolist() == [end > start and answered[start] for start, end in offsets]


@pytest.mark.parametrize("kind", PIECES)
def test_in_front_of_every_answer_stands_the_prompt_that_asks_for_it(kind: str) -> None:
    tokenizer = word_tokenizer(TEMPLATES.get(kind))
    encoder = ChatEncoder(tokenizer)
    messages = conversation(3)
    found = encoded(tokenizer, messages)
    starts = [n for n in range(1, len(found.tokens)) if found.answers[n] and not found.answers[n - 1]]
    assert len(starts) == 3
    for start, asked in zip(starts, (1, 3, 5), strict=True):
        if kind != "thinking" or asked == 1:
            assert encoder.prompt(messages[:asked]) == found.tokens[:start].tolist()


def test_contents_like_marks_roles_or_special_words_do_not_move_the_answers() -> None:
    tokenizer = word_tokenizer(CHATML)
    text = "w3 assistant w3 user : w4"
    messages = [Message("user", text), Message("assistant", text), Message("user", text), Message("assistant", "w3")]
    found = encoded(tokenizer, messages)
    expected = [
        a for piece, a in pieces_chatml(messages) for _ in tokenizer(piece, add_special_tokens=False)["input_ids"]
    ]
    assert found.answers.tolist() == expected


def test_without_an_end_of_turn_the_answer_ends_with_its_content() -> None:
    tokenizer = word_tokenizer(eos=False)
    messages = [Message("user", "w3 w4"), Message("assistant", "w5 w6")]
    found = encoded(tokenizer, messages)
    assert tokenizer.convert_ids_to_tokens(found.tokens) == [
        "<s>",
        "User",
        ":",
        "w3",
        "w4",
        "Assistant",
        ":",
        "w5",
        "w6",
    ]
    assert found.answers.tolist() == [False] * 7 + [True] * 2


def test_what_a_template_refuses_or_hides_is_told() -> None:
    two = [Message("user", "w3"), Message("user", "w3"), Message("assistant", "w4")]
    told = ChatEncoder(word_tokenizer(LLAMA_2)).encode(two)
    assert told == "conversation that the chat template refuses (roles must alternate)"
    shouting = "{% for m in messages %}{{ m.content | replace('w', 'W') }} {% endfor %}"
    told = ChatEncoder(word_tokenizer(shouting)).encode(two)
    assert told == "conversation whose answers the chat template changes"
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    told = ChatEncoder(word_tokenizer(silent)).encode(two)
    assert told == "conversation whose answers the chat template changes"


def test_a_tokenizer_that_can_not_tell_characters_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match=r"tokenizer must be a fast one .*, but Slow is not"):
        ChatEncoder(Slow())


def test_the_first_token_is_never_an_answer() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    found = encoded(tokenizer, [Message("user", "a"), Message("assistant", sentence() + " more")])
    assert found.answers.tolist() == [False] + [True] * (len(found.tokens) - 1)


def test_special_tokens_are_one_token_each() -> None:
    for tokenizer in (word_tokenizer(), byte_tokenizer(), piece_tokenizer()):
        for marker in MARKERS:
            assert len(tokenizer(marker, add_special_tokens=False)["input_ids"]) == 1


# Templates that show the time


TIMED = [
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    '\n  {%- if strftime_now is defined %}\n  {{- strftime_now("%A, %-d %B %Y %H:%M") }}\n  {% endif %}\n|{{ 1 }}',
    "   {% set year = strftime_now('%Y') | int + 1 %}{{ year }} {{ messages[0].content }}\n",
    "{% macro head() %}{{ strftime_now('%y' ~ '-%j') }}{% endmacro %}{{ head() }}{{ messages[0].content }}",
    "\n\n{{ messages[0].content }} has no time",
]


@pytest.mark.parametrize("template", TIMED)
def test_a_template_shows_a_given_time_as_transformers_would_at_that_moment(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = datetime(2031, 3, 4, 5, 6, 7)

    class Clock(datetime):
        @classmethod
        def now(cls, *_: Any) -> datetime:
            return moment

    messages = [{"role": "user", "content": " w3 "}]
    tokenizer = word_tokenizer(template)
    found = tokenizer.apply_chat_template(messages, chat_template=at_time(template, moment), tokenize=False)
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)
    assert found == tokenizer.apply_chat_template(messages, tokenize=False)
