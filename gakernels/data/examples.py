"""Records as token ids, within the limits of a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gakernels.data.bad_records import BadRecords
from gakernels.data.chat import ChatEncoder, EncodedConversation
from gakernels.data.conversations import ContextRecord, Conversation
from gakernels.errors import InputError
from gakernels.model.encoding import encode_text


@dataclass(frozen=True)
class Example:
    """A context as token ids (n,) int32, and its conversations, at least one."""

    context: npt.NDArray[np.int32]
    conversations: tuple[EncodedConversation, ...]


@dataclass(frozen=True)
class Limits:
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
    limits: Limits,
    bad: BadRecords,
    shortened: BadRecords,
    name: str = "data",
    progress: bool = True,
    clock: datetime | None = None,
) -> list[Example]:
    """The token ids of all records that fit.

    The context is written as `GenerativeAdapter.adapt` writes a text, with the tokenizer's opening tokens and without
    the chat template, as it will be at inference. A conversation over its limit loses its oldest exchanges (a message
    of the system at its beginning stays); one whose last exchange alone is too long is left out.

    Args:
        records: what `read_source` gives.
        tokenizer: a fast one.
        limits: contexts over theirs are left out, never cut: their questions may be about what would be lost.
        bad: counts what is left out.
        shortened: counts conversations that lost exchanges.
        name: of the source, for places and the progress bar.
        progress: show a bar.
        clock: see `ChatEncoder`.

    Raises:
        InputError: the tokenizer is a slow one.
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
            examples.append(Example(context, tuple(conversations)))
    return examples


def _within(
    encoder: ChatEncoder, messages: Conversation, limit: int, shortened: BadRecords, place: str
) -> EncodedConversation | str:
    """The longest end of a conversation that fits, in whole exchanges, or why it can't be used."""
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
    """The whole conversation, then without its first exchange, and so on to the last one."""
    system = messages[:1] if messages[0].role == "system" else ()
    spoken = messages[len(system) :]
    for number, message in enumerate(spoken):
        if message.role == "user" and (number == 0 or spoken[number - 1].role != "user"):
            yield system + spoken[number:]
