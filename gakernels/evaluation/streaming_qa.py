"""StreamingQA: CSV files of news articles with a question and its answers a row (docs/evaluation.md)."""

from pathlib import Path

from gakernels.evaluation.records import Context, Dataset, Question, Skipped, csv_rows, dataset

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
    contexts, skipped = [], Skipped()
    for line, row in csv_rows(path, COLUMNS):
        text, question, answers = (row[column].strip() for column in COLUMNS)
        golds = tuple(filter(None, map(str.strip, answers.split(SEPARATOR))))
        empty = next((name for name, value in zip(COLUMNS, (text, question, golds), strict=True) if not value), "")
        if empty:
            skipped.add(f"row without {empty}", f"{path}:{line}")
            continue
        name = f"{path.name}:{line}"
        contexts.append(Context(text, (Question(question, golds, id=name),), name))
    return dataset(path, contexts, skipped)
