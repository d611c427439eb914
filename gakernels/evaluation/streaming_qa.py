"""StreamingQA: CSV files of news articles with a question and its answers a row (docs/evaluation.md)."""

import csv
import io
from pathlib import Path

from gakernels.errors import InputError
from gakernels.evaluation.records import Context, Dataset, Question, Skipped, dataset, open_text

COLUMNS = ("text", "question", "answers")
SEPARATOR = "\\"  # between the answers of a question


def read_streaming_qa(path: Path) -> Dataset:
    """The articles of a file, each as a context with one question.

    Schema: the columns `text` (the article), `question` and `answers` (with backslashes between them); others are
    ignored. StreamingQA itself has questions without their articles, which come from the WMT news crawls; this is the
    form in which both are joined, and which the authors' code reads. Rows about the same article become one context in
    `squad.group_contexts`. Left out and counted: rows without text, question or answers.

    Raises:
        InputError: there is no such file, a column is missing, it is no CSV, or nothing is left.
    """
    reader = csv.DictReader(io.StringIO(open_text(path), newline=""), strict=True)
    contexts, skipped = [], Skipped()
    try:
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
        if missing:
            raise InputError(f"{path} must have the columns {', '.join(COLUMNS)}, but {missing[0]!r} is missing")
        for number, row in enumerate(reader):
            place = f"{path}:{reader.line_num}"
            text, question, answers = ((row[column] or "").strip() for column in COLUMNS)
            golds = tuple(filter(None, map(str.strip, answers.split(SEPARATOR))))
            empty = next((name for name, value in zip(COLUMNS, (text, question, golds), strict=True) if not value), "")
            if empty:
                skipped.add(f"row without {empty}", place)
                continue
            contexts.append(Context(text, (Question(question, golds, id=str(number)),), f"{path.name}:{number}"))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num} is no CSV: {error}") from error
    return dataset(path, contexts, skipped)
