"""Conversations as tokens, by the tokenizer's chat template, with the tokens that belong to answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gakernels.data.chat_templates import chat_template
from gakernels.data.clock import at_time
from gakernels.data.conversations import Message
from gakernels.errors import InputError
from gakernels.model.encoding import encode_text

PLAIN_TEMPLATE = (
    "{{ bos_token | default('') }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token | default('') }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids (n,) int32, and which of them are answers (n,) bool: those that the loss counts."""

    tokens: npt.NDArray[np.int32]
    answers: npt.NDArray[np.bool_]


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of a tokenizer, or `PLAIN_TEMPLATE` if it has none."""
    return chat_template(tokenizer) or PLAIN_TEMPLATE


class ChatEncoder:
    """Writes conversations as the tokenizer's chat template does, or as `PLAIN_TEMPLATE` if it has none.

    An answer is what the model has to write itself: everything from the end of the prompt that asks for it
    (`add_generation_prompt`) to the token that ends the turn, this one included. White space that the template puts
    behind that token is not part of it.

    Args:
        tokenizer: a fast one.
        clock: the time that the template shows (`strftime_now`); None for the present.

    Raises:
        InputError: the tokenizer can't tell which characters a token covers (a slow one), or has several chat templates
            and none named `default`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, clock: datetime | None = None) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                "tokenizer must be a fast one (of the tokenizers library), which tells the characters of each token, "
                f"but {type(tokenizer).__name__} is not"
            )
        self._tokenizer = tokenizer
        template = template_of(tokenizer)
        self._template = template if clock is None else at_time(template, clock)
        special = {token for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if token.strip()}
        names = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        self._end_of_turn = re.compile(rf"\s*(?:{names})") if names else None

    def encode(self, messages: Sequence[Message]) -> EncodedConversation | str:
        """The tokens of a conversation, or why it can't be used.

        A token counts as an answer if it covers a character of one. The first token never does: nothing predicts it.
        """
        try:
            text, spans = self._answer_spans(messages)
        except TemplateError as error:
            return f"conversation that the chat template refuses ({error})"
        if len(spans) < sum(message.role == "assistant" for message in messages):
            return "conversation whose answers the chat template does not show as they are"
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = np.array(encoded["input_ids"], dtype=np.int32)
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        answers = np.zeros(len(tokens), dtype=bool)
        for start, end in spans:
            answers |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        answers[:1] = False
        return EncodedConversation(tokens, answers) if answers.any() else "conversation without a token to learn"

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that ask for the next answer of a conversation that ends with the user."""
        text = self._render(messages, True)
        return encode_text(self._tokenizer, text, begins=False)

    def _answer_spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where in it each answer begins and ends.

        The template is asked a second time with a mark in place of each answer: what stands between the marks is the
        template's, wherever it puts it.
        """
        text = self._render(messages, False)
        numbers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        marks = {number: f"@@answer-{number}@@" for number in numbers}
        marked = self._render([Message(m.role, marks.get(n, m.content)) for n, m in enumerate(messages)], False)
        spans: list[tuple[int, int]] = []
        place = 0
        for number in numbers:
            before, _, marked = marked.partition(marks[number])
            content = messages[number].content
            if not text.startswith(before + content, place):
                return text, []
            begin, place = place + len(before), place + len(before) + len(content)
            end = self._end_of_turn.match(marked) if self._end_of_turn else None
            spans.append((self._begin(text, messages[:number], spans, begin), place + (end.end() if end else 0)))
        return text, spans if text[place:] == marked else []

    def _begin(self, text: str, asked: Sequence[Message], spans: Sequence[tuple[int, int]], content: int) -> int:
        """Where the prompt ends, if the text begins with it; otherwise where the content of the answer begins."""
        prompt = self._render(asked, True)
        after = spans[-1][1] if spans else 0
        return len(prompt) if after <= len(prompt) <= content and text.startswith(prompt) else content

    def _render(self, messages: Sequence[Message], ask: bool) -> str:
        written = self._tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            chat_template=self._template,
            add_generation_prompt=ask,
            tokenize=False,
        )
        return str(written)
