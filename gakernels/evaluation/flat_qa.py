"""Flat rows of a context, a question and its answers, in the kinds of file that people keep them in."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gakernels.data.bad_records import BadRecords
from gakernels.data.compression import kind_of
from gakernels.data.records import read_records
from gakernels.data.sources import HUB, HubSource, source_of
from gakernels.errors import InputError
from gakernels.evaluation.records import Context, Dataset, Question, Skipped, csv_rows, dataset, text_of
from gakernels.user_text import read_user_text

COLUMNS = ("context", "question")
Row = tuple[str, Mapping[str, Any]]


def read_flat_qa(name: str) -> Dataset:
    """The contexts of flat rows `{context, question, answer}`, each with all its questions.

    `answers` may stand for `answer`; either is a text, a number, a list of them, or SQuAD's `{"text": [...]}`. Other
    entries are ignored. Left out and counted: rows without a context, a question or an answer.

    Args:
        name: a file of JSON (a list of rows), JSON lines, Parquet (both also compressed) or CSV, by its ending, or
            `hub:` and the name of a data set, as `hub:owner/name:split`.

    Raises:
        InputError: there is no such file, it is not of the form that its ending says, or nothing is left.
    """
    by_context: dict[str, list[Question]] = {}
    skipped = Skipped()
    for place, row in _rows(name, skipped):
        context, question, answers = text_of(row.get("context")), text_of(row.get("question")), answers_of(row)
        parts = {"context": context, "question": question, "answer": answers}
        empty = next((part for part, value in parts.items() if not value), None)
        if empty:
            skipped.add(f"row without {empty}", place)
        else:
            by_context.setdefault(context, []).append(Question(question, answers, id=str(row.get("id", place))))
    contexts = [Context(text, tuple(questions), questions[0].id) for text, questions in by_context.items()]
    return dataset(Path(name), contexts, skipped)


def answers_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The gold answers of a row, as texts."""
    value = next((row[name] for name in ("answers", "answer") if row.get(name) is not None), None)
    value = value.get("text") if isinstance(value, Mapping) else value
    listed = value if isinstance(value, (list, tuple)) else [value]
    texts = (str(one) if isinstance(one, (int, float)) else text_of(one) for one in listed)
    return tuple(dict.fromkeys(filter(None, texts)))


def _rows(name: str, skipped: Skipped) -> Iterator[Row]:
    if name.startswith(HUB):
        hub = source_of(name)
        assert isinstance(hub, HubSource)
        for record in hub.rows():
            yield record.place, record.entries
        return
    path = Path(name)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if kind_of(path) == ".csv":
        for line, row in csv_rows(path, COLUMNS):
            yield f"{path}:{line}", row
    elif kind_of(path) == ".json":
        yield from _json_rows(path, skipped)
    else:
        bad = BadRecords()
        for record in read_records(path, bad):
            yield record.place, record.entries
        for kind, places in bad.places.items():
            for number in range(bad.counts[kind]):
                skipped.add(kind, places[min(number, len(places) - 1)])


def _json_rows(path: Path, skipped: Skipped) -> Iterator[Row]:
    text = read_user_text(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON, but it is not: {error}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} must be a list of rows {{context, question, answer}}, or a SQuAD file")
    for number, row in enumerate(rows, 1):
        place = f"row {number} of {path}"
        if isinstance(row, dict):
            yield place, row
        else:
            skipped.add("row that is no JSON object", place)


def is_squad(path: Path) -> bool:
    """Whether a JSON file is an object, as SQuAD's, and no list of rows."""
    return kind_of(path) == ".json" and read_user_text(path).lstrip().startswith("{")


def is_streaming_qa(path: Path) -> bool:
    """Whether a CSV file has the column of StreamingQA's articles."""
    return kind_of(path) == ".csv" and "text" in read_user_text(path).partition("\n")[0].strip().split(",")
