"""Synthetic-Persona-Chat: CSV files of two personas and a conversation a row (docs/evaluation.md)."""

from pathlib import Path

from gakernels.errors import InputError
from gakernels.evaluation.dialogue import conversation, recall_questions, response_questions
from gakernels.evaluation.records import Context, Dataset, Question, Skipped, csv_rows, dataset

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
    contexts, skipped = [], Skipped()
    for line, row in csv_rows(path, COLUMNS):
        context = _context(row, f"{path.name}:{line}", questions)
        if isinstance(context, Context):
            contexts.append(context)
        else:
            skipped.add(context, f"{path}:{line}")
    return dataset(path, contexts, skipped)


def _context(row: dict[str, str], name: str, questions: str) -> Context | str:
    """The context of a row, or why there is none."""
    turns = _turns(row[COLUMNS[2]])
    personas = [
        (user, [line.strip() for line in row[column].split("\n") if line.strip()])
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
