"""LoCoMo: long conversations over many sessions with questions (docs/evaluation.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gakernels.errors import InputError
from gakernels.evaluation.dialogue import conversation
from gakernels.evaluation.records import Context, Dataset, Question, Skipped, dataset, list_of, text_of
from gakernels.user_text import read_user_text

_SESSION = re.compile(r"session_(\d+)")


def read_locomo(path: Path) -> Dataset:
    """The conversations of a file with their questions.

    Schema: `[{"sample_id", "conversation": {"session_1_date_time": str, "session_1": [{"speaker", "text"}], ...}, "qa":
    [{"question", "answer"}]}]`. The date of a session stands above it. Left out and counted: entries without sessions
    or questions, questions without text or answer (LoCoMo's adversarial ones have none).

    Raises:
        InputError: there is no such file, it is no JSON of this form, or nothing is left of it.
    """
    try:
        content = json.loads(read_user_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} must be JSON, but it is not: {error}") from error
    if not isinstance(content, list):
        raise InputError(f"{path} must be a LoCoMo file, a JSON list of conversations")
    contexts, skipped = [], Skipped()
    for number, entry in enumerate(content):
        place = f"{path}[{number}]"
        entry = entry if isinstance(entry, dict) else {}
        text = _sessions(entry.get("conversation"))
        questions = _questions(entry.get("qa"), place, skipped)
        if text and questions:
            contexts.append(Context(text, questions, str(entry.get("sample_id", number))))
        else:
            skipped.add("entry without questions" if text else "entry without sessions", place)
    return dataset(path, contexts, skipped)


def _sessions(sessions: Any) -> str:
    """The sessions in the order of their numbers, with empty lines between them."""
    sessions = sessions if isinstance(sessions, dict) else {}
    found = {int(match[1]): list_of(turns) for name, turns in sessions.items() if (match := _SESSION.fullmatch(name))}
    texts = []
    for number in sorted(found):
        turns = [turn for turn in found[number] if isinstance(turn, dict)]
        spoken = [(text_of(turn.get("speaker")), text_of(turn.get("text"))) for turn in turns]
        said = conversation([(speaker, text) for speaker, text in spoken if speaker and text])
        date = text_of(sessions.get(f"session_{number}_date_time"))
        if said:
            texts.append("\n".join(filter(None, (date, said))))
    return "\n\n".join(texts)


def _questions(entries: Any, place: str, skipped: Skipped) -> tuple[Question, ...]:
    questions = []
    for number, entry in enumerate(list_of(entries)):
        entry = entry if isinstance(entry, dict) else {}
        answer = entry.get("answer")
        text, wanted = text_of(entry.get("question")), text_of(str(answer) if isinstance(answer, int) else answer)
        if text and wanted:
            questions.append(Question(text, (wanted,), id=f"{place}.qa[{number}]"))
        else:
            skipped.add("question without answers" if text else "question without text", f"{place}.qa[{number}]")
    return tuple(questions)
