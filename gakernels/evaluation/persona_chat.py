"""Synthetic-Persona-Chat: CSV files of two personas and a conversation a row (docs/evaluation.md)."""

import csv
import io
from pathlib import Path

from gakernels.errors import InputError
from gakernels.evaluation.dialogue import conversation, recall_questions, response_questions
from gakernels.evaluation.records import Context, Dataset, Question, Skipped, dataset, open_text

QUESTIONS = ("recall", "response")
USERS = ("User 1", "User 2")
COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")


def read_persona_chat(path: Path, questions: str = "recall") -> Dataset:
    """The conversations of a file.

    Schema: the columns `user 1 personas` and `user 2 personas` (a sentence a line) and `Best Generated Conversation`
    (lines that begin with "User 1:" or "User 2:"; others go on with the turn before them). Left out and counted: rows
    without a conversation or without personas.

    Args:
        path: the file.
        questions: `recall`: the context is the conversation, and both personas are asked for; `response`: the context
            is both personas, and each turn of the conversation is asked for.

    Raises:
        InputError: there is no such file or kind of question, a column is missing, it is no CSV, or nothing is left.
    """
    if questions not in QUESTIONS:
        raise InputError(f"questions must be one of {', '.join(QUESTIONS)}, but it is {questions!r}")
    reader = csv.DictReader(io.StringIO(open_text(path), newline=""), strict=True)
    contexts, skipped = [], Skipped()
    try:
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
        if missing:
            raise InputError(f"{path} must have the columns {', '.join(COLUMNS)}, but {missing[0]!r} is missing")
        for row in reader:
            context = _context(row, f"{path.name}:{reader.line_num}", questions)
            if isinstance(context, Context):
                contexts.append(context)
            else:
                skipped.add(context, f"{path}:{reader.line_num}")
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num} is no CSV: {error}") from error
    return dataset(path, contexts, skipped)


def _context(row: dict[str, str | None], name: str, questions: str) -> Context | str:
    """The context of a row, or why there is none."""
    turns = _turns(row[COLUMNS[2]] or "")
    personas = [
        (user, [line.strip() for line in (row[column] or "").split("\n") if line.strip()])
        for user, column in zip(USERS, COLUMNS, strict=False)
    ]
    if len(turns) < 2:
        return "row without a conversation"
    if not any(sentences for _, sentences in personas):
        return "row without personas"
    if questions == "recall":
        asked: tuple[Question, ...] = recall_questions(personas, name)
        return Context(conversation(turns), asked, name)
    known = "\n\n".join(f"{user}: {' '.join(sentences)}" for user, sentences in personas if sentences)
    return Context(known, response_questions(turns, name), name)


def _turns(text: str) -> list[tuple[str, str]]:
    turns: list[tuple[str, str]] = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        speaker, colon, said = line.partition(":")
        if colon and speaker in USERS:
            turns.append((speaker, said.strip()))
        elif turns:
            turns[-1] = (turns[-1][0], f"{turns[-1][1]} {line}".strip())
    return [(speaker, said) for speaker, said in turns if said]
