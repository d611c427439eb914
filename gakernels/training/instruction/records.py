"""What a row of instruction data becomes: a context, and conversations that need it (docs/instruction_tuning.md)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gakernels.training.data.bad_records import BadRecords

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """What someone says: the `system`, the `user` or the `assistant`; no space around it."""

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class ContextRecord:
    """A text to take in, and at least one conversation, each of which ends with a message of the assistant."""

    context: str
    conversations: tuple[Conversation, ...]


def record_of(row: Mapping[str, Any], place: str, bad: BadRecords) -> ContextRecord | None:
    """The record of a row in one of the known forms; what can't be used is counted and left out.

    | entries | form |
    |---|---|
    | context, messages | one conversation: [{"role", "content"}, ...] |
    | context, conversations | several: a list of such lists |
    | context, question, answers (or answer) | a question; the first answer is learned |
    | context, qas | several: [{"question", "answers"}, ...] |
    | examples, queries | demonstrations [{"input", "output"}, ...]; without queries the last example is asked for |
    | instruction, input, output | the input is the context |

    A context is a text, or a list of texts or messages ({"role", "content"} or {"speaker", "text"}), one a line.

    Args:
        row: the entries; others than those named are ignored.
        place: where it stands, for the count.
        bad: counts what is left out: a row, or one of its conversations.
    """
    conversations: list[Conversation] = []
    for found in _conversations(row):
        if isinstance(found, str):
            bad.add(found, place)
        else:
            conversations.append(found)
    context = _context(row)
    if conversations and context:
        return ContextRecord(context, tuple(conversations))
    if conversations:
        bad.add("record without context", place)
    return None


def _conversations(row: Mapping[str, Any]) -> list[Conversation | str]:
    """Each conversation of a row, or why it can't be used; never empty."""
    if "messages" in row:
        return [_dialogue(row["messages"])]
    if "conversations" in row:
        return [_dialogue(messages) for messages in _list(row["conversations"])] or ["record without conversation"]
    if "examples" in row:
        _, asked = _demonstrations(row)
        return [_exchange(f"Input: {given}\nOutput:", wanted) for given, wanted in asked] or ["record without examples"]
    if "qas" in row:
        return [_question(entry) for entry in _list(row["qas"])] or ["record without questions"]
    if "question" in row:
        return [_question(row)]
    if "instruction" in row and "output" in row:
        return [_exchange(_text(row["instruction"]), _text(row["output"]))]
    return ["record of no known form"]


def _context(row: Mapping[str, Any]) -> str:
    if "examples" in row:
        shown, _ = _demonstrations(row)
        return "\n\n".join(f"Input: {given}\nOutput: {wanted}" for given, wanted in shown)
    value = row.get("context", row.get("input"))
    return "\n".join(filter(None, map(_line, _list(value)))) or _text(value)


def _line(value: object) -> str:
    """A line of a context that is a list: a text, or who said what."""
    if not isinstance(value, Mapping):
        return _text(value)
    name = _text(value.get("role", value.get("speaker")))
    said = _text(value.get("content", value.get("text")))
    return f"{name[:1].upper()}{name[1:]}: {said}" if name and said else said


def _dialogue(messages: object) -> Conversation | str:
    conversation = tuple(
        Message(_text(message.get("role")), _text(message.get("content")))
        for message in _list(messages)
        if isinstance(message, Mapping)
    )
    if len(conversation) < max(1, len(_list(messages))):
        return "conversation that is no list of messages"
    if any(message.role not in ROLES for message in conversation):
        return "message whose role is not system, user or assistant"
    if not all(message.content for message in conversation):
        return "message without content"
    spoken = [message.role for message in conversation if message.role != "system"]
    if spoken[:1] != ["user"]:
        return "conversation that does not begin with the user"
    if conversation[-1].role != "assistant":
        return "conversation that does not end with the assistant"
    return conversation


def _question(entry: object) -> Conversation | str:
    """A question with its first answer; answers are a text, a list of texts or {"text": ...}, or {"text": [...]}."""
    if not isinstance(entry, Mapping):
        return "question without text"
    answers = entry.get("answers", entry.get("answer"))
    answers = answers.get("text") if isinstance(answers, Mapping) else answers
    listed = answers if isinstance(answers, (list, tuple)) else [answers]
    texts = [_text(answer.get("text") if isinstance(answer, Mapping) else answer) for answer in listed]
    return _exchange(_text(entry.get("question")), next(filter(None, texts), ""))


def _exchange(asked: str, answer: str) -> Conversation | str:
    if not asked:
        return "question without text"
    if not answer:
        return "question without answers"
    return Message("user", asked), Message("assistant", answer)


def _demonstrations(row: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The pairs of input and output that are shown, and those that are asked for."""
    shown, asked = (
        [
            (_text(pair.get("input")), _text(pair.get("output")))
            for pair in _list(row.get(name))
            if isinstance(pair, Mapping)
        ]
        for name in ("examples", "queries")
    )
    shown = [(given, wanted) for given, wanted in shown if given and wanted]
    return (shown, asked) if asked else (shown[:-1], shown[-1:])


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []
