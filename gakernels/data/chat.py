"""Instruction data as tokens: contexts, and conversations by the tokenizer's chat template, with their answers."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gakernels.data.bad_records import BadRecords
from gakernels.data.conversations import ContextRecord, Conversation, Message
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
_DEFAULT = "default"  # the one to use if there are several chat templates
_FUNCTION = "strftime_now"
_DIRECTIVE = re.compile(r"%[-_0^#]*[A-Za-z]")


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids (n,) int32, and which of them belong to answers, (n,) bool: those that the loss counts."""

    tokens: npt.NDArray[np.int32]
    answers: npt.NDArray[np.bool_]


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of a tokenizer, or `PLAIN_TEMPLATE` if it has none."""
    return chat_template(tokenizer) or PLAIN_TEMPLATE


class ChatEncoder:
    """Formats conversations with the tokenizer's chat template, or with `PLAIN_TEMPLATE` if it has none.

    An answer is what the model has to write itself: everything from the end of the prompt that asks for it
    (`add_generation_prompt`) to the token that ends the turn, inclusive. White space that the template puts
    after that token is not part of it.

    Args:
        tokenizer: a fast one.
        clock: the time that the template shows (`strftime_now`); None for the present time.

    Raises:
        InputError: the tokenizer can't report which characters a token covers (a slow one), or has several chat
            templates and none named `default`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, clock: datetime | None = None) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                "tokenizer must be a fast one (of the tokenizers library), which reports the characters of each token, "
                f"but {type(tokenizer).__name__} is not"
            )
        self._tokenizer = tokenizer
        template = template_of(tokenizer)
        self._template = template if clock is None else at_time(template, clock)
        special = {token for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if token.strip()}
        names = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        self._end_of_turn = re.compile(rf"\s*(?:{names})") if names else None

    def encode(self, messages: Sequence[Message]) -> EncodedConversation | str:
        """The tokens of a conversation, or the reason why it can't be used.

        A token counts as an answer if it covers a character of one. The first token never does: nothing predicts it.
        """
        try:
            text, spans = self._answer_spans(messages)
        except TemplateError as error:
            return f"conversation that the chat template refuses ({error})"
        if len(spans) < sum(message.role == "assistant" for message in messages):
            return "conversation whose answers the chat template changes"
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
        """The text of a conversation, and where each answer begins and ends in it.

        The template is applied a second time with a mark in place of each answer; everything between the marks is the
        template's.
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


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's Jinja chat template (if it has several, the one named `default`), or None.

    Raises:
        InputError: it has several, none of which has that name.
    """
    given = tokenizer.chat_template
    if isinstance(given, (list, tuple)):
        given = {entry["name"]: entry["template"] for entry in given}
    if not given or isinstance(given, str):
        return given or None
    if _DEFAULT not in given:
        raise InputError(
            f"the tokenizer's chat templates must have one named {_DEFAULT!r}, but they are {', '.join(sorted(given))}"
        )
    return str(given[_DEFAULT])


def shows_time(template: str) -> bool:
    """Whether a chat template shows the time."""
    return _FUNCTION in template


def parse_clock(text: str) -> datetime:
    """The moment that a recipe names. Raises: InputError: it does not name one."""
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"clock must be a time like 2026-01-31T12:00:00, but it is {text!r}") from error


def at_time(template: str, clock: datetime) -> str:
    """A chat template in which `strftime_now` gives a fixed moment.

    The renderer takes no functions from outside, so a macro of that name is put in front of the template. It writes
    every directive that occurs in the template.
    """
    if not shows_time(template):
        return template
    directives = sorted(set(_DIRECTIVE.findall(template)), key=len, reverse=True)
    written = "".join(f" | replace({json.dumps(d)}, {json.dumps(clock.strftime(d))})" for d in directives)
    # The line end after a block is dropped, so the template begins as it would without the macro.
    return f"{{% macro {_FUNCTION}(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{template}"


@dataclass(frozen=True)
class EncodedRecord:
    """A context as token ids (n,) int32, and its conversations, at least one."""

    context: npt.NDArray[np.int32]
    conversations: tuple[EncodedConversation, ...]


@dataclass(frozen=True)
class TokenLimits:
    """Longest context and longest conversation, in tokens.

    Raises:
        InputError: a limit is below 2.
    """

    context: int
    conversation: int

    def __post_init__(self) -> None:
        for name in ("context", "conversation"):
            if getattr(self, name) < 2:
                raise InputError(f"the limit of a {name} must be at least 2 tokens, but it is {getattr(self, name)}")


def encode_records(
    records: Sequence[ContextRecord],
    tokenizer: PreTrainedTokenizerBase,
    limits: TokenLimits,
    bad: BadRecords,
    shortened: BadRecords,
    name: str = "data",
    progress: bool = True,
    clock: datetime | None = None,
) -> list[EncodedRecord]:
    """The token ids of all records that fit.

    The context is tokenised as `GenerativeAdapter.adapt` writes a text, with the tokenizer's opening tokens and without
    the chat template, as at inference. A conversation over its limit loses its oldest exchanges (a system message at
    its beginning stays); if even the last exchange is too long, it is left out.

    Args:
        records: what `read_source` gives.
        tokenizer: a fast one.
        limits: contexts over their limit are left out, never cut: their questions may be about the part that would be
            lost.
        bad: counts what is left out.
        shortened: counts conversations that lost exchanges.
        name: name of the source, for places and the progress bar.
        progress: show a bar.
        clock: see `ChatEncoder`.

    Raises:
        InputError: the tokenizer is slow.
    """
    encoder = ChatEncoder(tokenizer, clock)
    examples = []
    for number, record in enumerate(tqdm(records, desc=f"tokenising {name}", unit="context", disable=not progress), 1):
        place = f"context {number} of {name}"
        context = np.array(encode_text(tokenizer, record.context), dtype=np.int32)
        if not 0 < len(context) <= limits.context:
            bad.add(f"context of more than {limits.context} tokens" if len(context) else "empty context", place)
            continue
        conversations = []
        for messages in record.conversations:
            encoded = _within(encoder, messages, limits.conversation, shortened, place)
            if isinstance(encoded, str):
                bad.add(encoded, place)
            else:
                conversations.append(encoded)
        if conversations:
            examples.append(EncodedRecord(context, tuple(conversations)))
    return examples


def _within(
    encoder: ChatEncoder, messages: Conversation, limit: int, shortened: BadRecords, place: str
) -> EncodedConversation | str:
    """The longest end of a conversation that fits, in whole exchanges, or the reason why it can't be used."""
    for number, shorter in enumerate(_ends(messages)):
        encoded = encoder.encode(shorter)
        if isinstance(encoded, str):
            return encoded
        if len(encoded.tokens) <= limit:
            if number:
                shortened.add("conversation without its oldest exchanges", place)
            return encoded
    return f"conversation whose last exchange has more than {limit} tokens"


def _ends(messages: Conversation) -> Iterator[Conversation]:
    """The whole conversation, then without its first exchange, and so on down to the last one."""
    system = messages[:1] if messages[0].role == "system" else ()
    spoken = messages[len(system) :]
    for number, message in enumerate(spoken):
        if message.role == "user" and (number == 0 or spoken[number - 1].role != "user"):
            yield system + spoken[number:]
