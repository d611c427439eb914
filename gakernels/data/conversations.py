"""What a row of instruction data becomes: a context, and conversations that need it (docs/training.md)."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

from gakernels.data.bad_records import BadRecords

# The names that data sets use for the speakers.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Message:
    """What someone says: the `system`, the `user` or the `assistant`; stripped of surrounding space."""

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class ContextRecord:
    """A text to read, and at least one conversation, each of which ends with a message of the assistant."""

    context: str
    conversations: tuple[Conversation, ...]


def record_of(row: Mapping[str, Any], place: str, bad: BadRecords) -> ContextRecord | None:
    """The record of a row in one of the known forms; what can't be used is counted and left out.

    | entries | form |
    |---|---|
    | context, messages | one conversation: [{"role", "content"}, ...] or [{"from", "value"}, ...] |
    | context, conversations | the same, or several: a list of such lists |
    | context, question, answers (or answer, response) | a question; the first answer is learned |
    | context, qas | several: [{"question", "answers"}, ...] |
    | context, prompt, completion | each a text or a list of messages |
    | examples, queries | demonstrations [{"input", "output"}, ...]; without queries, the last example is the question |
    | instruction, input, output (or response) | the input is the context, or with a context part of the question |

    A context is a text, or a list of texts or messages (these, or {"speaker", "text"}), one per line. A row that has
    messages, prompt and completion or an instruction may have a `system` message, and an instruction a `history` of
    [question, answer] pairs. Other texts may also be numbers, or lists of parts ({"type": "text", "text"}) as lines.

    Args:
        row: the entries; any others are ignored.
        place: where the row is, for the count.
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
    """Each conversation of a row, or the reason why it can't be used; never empty."""
    if "messages" in row:
        return [_with_system(row, _dialogue(row["messages"]))]
    if "conversations" in row:
        listed = _list(row["conversations"])
        several = [listed] if any(isinstance(entry, Mapping) for entry in listed) else listed
        found = [_with_system(row, _dialogue(messages)) for messages in several]
        return found or ["record without conversation"]
    if "examples" in row:
        _, asked, faults = _demonstrations(row)
        exchanges = [_exchange(f"Input: {given}\nOutput:", wanted) for given, wanted in asked]
        return [*faults, *exchanges] or ["record without examples"]
    if "qas" in row:
        return [_question(entry) for entry in _list(row["qas"])] or ["record without questions"]
    if "question" in row:
        return [_question(row)]
    if "prompt" in row and ("completion" in row or "response" in row):
        answer = _messages(_entry(row, "completion", "response"), "assistant")
        return [_with_system(row, _dialogue([*_messages(row["prompt"], "user"), *answer]))]
    if "instruction" in row and ("output" in row or "response" in row):
        return [_with_system(row, _instruction(row))]
    return ["record of an unknown form"]


def _with_system(row: Mapping[str, Any], said: Conversation | str) -> Conversation | str:
    """A conversation preceded by the system message of its row, unless it begins with one of its own."""
    system = row.get("system")
    if isinstance(said, str) or _is_blank(system) or said[0].role == "system":
        return said
    text = _text(system)
    return (Message("system", text), *said) if text else "system message that is not text"


def _context(row: Mapping[str, Any]) -> str:
    if "examples" in row:
        shown, _, _ = _demonstrations(row)
        return "\n\n".join(f"Input: {given}\nOutput: {wanted}" for given, wanted in shown)
    if "context" not in row:
        return _text(row.get("input"))
    value = row["context"]
    return "\n".join(filter(None, map(_line, _list(value)))) or (_text(value) if isinstance(value, str) else "")


def _line(value: object) -> str:
    """A line of a context that is a list: a text, or who said what."""
    if not isinstance(value, Mapping):
        return _text(value)
    name = _text(_entry(value, "role", "from", "speaker"))
    name = ROLES.get(name.lower(), name)
    said = _text(_entry(value, "content", "value", "text"))
    return f"{name[:1].upper()}{name[1:]}: {said}" if name and said else said


def _messages(value: object, role: str) -> list[Any]:
    """A text becomes one message of the role; a list of messages is returned as it is."""
    is_dialogue = any(isinstance(entry, Mapping) and {"role", "from"} & entry.keys() for entry in _list(value))
    return _list(value) if is_dialogue else [{"role": role, "content": value}]


def _dialogue(messages: object) -> Conversation | str:
    entries = _list(messages)
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        return "conversation that is not a list of messages"
    conversation = []
    for entry in entries:
        role, content = _text(_entry(entry, "role", "from")).lower(), _entry(entry, "content", "value")
        if role not in ROLES:
            return "message whose role is not system, user or assistant"
        if not _text(content):
            return "message without content" if _is_blank(content) else "message whose content is not text"
        conversation.append(Message(ROLES[role], _text(content)))
    spoken = [message.role for message in conversation if message.role != "system"]
    if spoken[:1] != ["user"]:
        return "conversation that does not begin with the user"
    if conversation[-1].role != "assistant":
        return "conversation that does not end with the assistant"
    return tuple(conversation)


def _question(entry: object) -> Conversation | str:
    """A question with its first answer; answers are a text, a list of texts or of {"text": ...}, or {"text": [...]}."""
    if not isinstance(entry, Mapping):
        return "question without text"
    answers = _entry(entry, "answers", "answer", "response")
    answers = answers.get("text") if isinstance(answers, Mapping) else answers
    listed = answers if isinstance(answers, (list, tuple)) else [answers]
    values = [answer.get("text") if isinstance(answer, Mapping) else answer for answer in listed]
    return _exchange(entry.get("question"), next((value for value in values if not _is_blank(value)), None))


def _instruction(row: Mapping[str, Any]) -> Conversation | str:
    """An instruction with its history; if there is a context, the input is part of the question."""
    asked = row["instruction"]
    if "context" in row and _text(row.get("input")):
        asked = f"{_text(asked)}\n{_text(row['input'])}"
    history = row.get("history")
    said: Conversation = ()
    for pair in _list(history) or ([] if _is_blank(history) else [history]):
        exchange = _exchange(*pair) if isinstance(pair, (list, tuple)) and len(pair) == 2 else ""
        if not isinstance(exchange, tuple):
            return "history that is not a list of questions with their answers"
        said += exchange
    last = _exchange(asked, _entry(row, "output", "response"))
    return said + last if isinstance(last, tuple) else last


def _exchange(asked: object, answer: object) -> tuple[Message, ...] | str:
    if not _text(asked):
        return "question without text" if _is_blank(asked) else "question that is not text"
    if not _text(answer):
        return "question without answers" if _is_blank(answer) else "answer that is neither text nor number"
    return Message("user", _text(asked)), Message("assistant", _text(answer))


Pairs = list[tuple[str, str]]


def _demonstrations(row: Mapping[str, Any]) -> tuple[Pairs, Pairs, list[str]]:
    """The (input, output) pairs to show, those to ask for, and the faults of the others."""
    shown, asked = (
        [
            (_text(pair.get("input")), _text(pair.get("output"))) if isinstance(pair, Mapping) else ("", "")
            for pair in _list(row.get(name))
        ]
        for name in ("examples", "queries")
    )
    faults = ["example without input or output" for pair in (*shown, *asked) if not all(pair)]
    shown, asked = ([pair for pair in pairs if all(pair)] for pairs in (shown, asked))
    return (shown, asked, faults) if asked else (shown[:-1], shown[-1:], faults)


def _entry(entries: Mapping[str, Any], *names: str) -> Any:
    """The first entry that exists under several names for the same thing."""
    return next((entries[name] for name in names if entries.get(name) is not None), None)


def _text(value: object) -> str:
    """A text, a number or the texts of parts, as stripped text; empty for everything else."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (list, tuple)):
        parts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        return "\n".join(parts).strip() if all(isinstance(part, str) for part in parts) else ""
    return str(value) if isinstance(value, Number) and not isinstance(value, bool) and not _is_blank(value) else ""


def _is_blank(value: object) -> bool:
    """Whether a value is missing: None, blank text, no parts, or the NaN of an empty table cell."""
    if isinstance(value, (list, tuple)):
        return all(_is_blank(part.get("text") if isinstance(part, Mapping) else part) for part in value)
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []
