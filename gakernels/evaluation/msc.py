"""Multi-Session Chat as ParlAI ships it, and MSC-Self-Instruct, which adds a question (docs/evaluation.md)."""

from pathlib import Path
from typing import Any

from gakernels.errors import InputError
from gakernels.evaluation.dialogue import conversation, recall_questions, response_questions
from gakernels.evaluation.records import (
    Context,
    Dataset,
    Question,
    Skipped,
    dataset,
    json_lines,
    list_of,
    text_of,
    texts_of,
)

QUESTIONS = ("self_instruct", "response", "recall")
SPEAKERS = ("Speaker 1", "Speaker 2")


def read_msc(path: Path, questions: str = "self_instruct") -> Dataset:
    """The conversations of a file of sessions, a line each.

    Schema, a line: `{"previous_dialogs": [{"dialog": [{"text": str}]}], "dialog": [{"text": str, "id": str}],
    "personas": [[str], [str]], "self_instruct": {"B": str, "A": str}}`; turns without an `id` belong to Speaker 1 and
    Speaker 2 in turn. Left out and counted: lines that are no JSON object, without earlier sessions, or without what
    the questions need.

    Args:
        path: the file.
        questions: `self_instruct`: question B with answer A about all sessions (MemGPT's deep memory retrieval; the
            paper's protocol); `response`: each turn of the last session, after the earlier ones; `recall`: the personas
            that annotators summed up, after the earlier sessions.

    Raises:
        InputError: there is no such file or kind of question, or nothing is left of the file.
    """
    if questions not in QUESTIONS:
        raise InputError(f"questions must be one of {', '.join(QUESTIONS)}, but it is {questions!r}")
    contexts, skipped = [], Skipped()
    for place, entry in json_lines(path, skipped):
        sessions = [turns for turns in map(_turns, list_of(entry.get("previous_dialogs"))) if turns]
        last, name = _turns(entry), place.rpartition("/")[2]
        asked = _questions(entry, last, name, questions)
        if not sessions:
            skipped.add("line without earlier sessions", place)
        elif not asked:
            skipped.add(f"line without what {questions} questions need", place)
        else:
            read = [*sessions, last] if questions == "self_instruct" and last else sessions
            contexts.append(Context("\n\n".join(map(conversation, read)), asked, name))
    return dataset(path, contexts, skipped)


def _turns(session: Any) -> list[tuple[str, str]]:
    """Speaker and text of each turn of a session that is not empty."""
    turns = list_of(session.get("dialog")) if isinstance(session, dict) else []
    spoken = [
        (text_of(turn.get("id")) or SPEAKERS[n % 2], text_of(turn.get("text")))
        for n, turn in enumerate(turns)
        if isinstance(turn, dict)
    ]
    return [(speaker, text) for speaker, text in spoken if text]


def _questions(entry: dict[str, Any], last: list[tuple[str, str]], name: str, kind: str) -> tuple[Question, ...]:
    if kind == "response":
        return response_questions(last, name)
    if kind == "recall":
        personas = map(texts_of, list_of(entry.get("personas")))
        return recall_questions(list(zip(SPEAKERS, personas, strict=False)), name)
    pair = entry.get("self_instruct")
    asked, answer = (text_of(pair.get(key)) if isinstance(pair, dict) else "" for key in ("B", "A"))
    return (Question(asked, (answer,), id=name),) if asked and answer else ()
