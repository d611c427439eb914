"""What all data sets become: contexts with questions and gold answers; and what was left out on the way."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gakernels.errors import InputError
from gakernels.user_text import read_user_text


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        text: what is asked; the input of a task, or the conversation so far.
        answers: gold answers, at least one.
        options: answers to choose from; empty where the answer is free.
        id: as the data set names it.
    """

    text: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    id: str = ""


@dataclass(frozen=True)
class Context:
    """A text to take in, and what is asked about it afterwards.

    Attributes:
        text: the context.
        questions: at least one.
        name: where it comes from: the title of an article, a line of a file.
    """

    text: str
    questions: tuple[Question, ...]
    name: str = ""


@dataclass
class Skipped:
    """Records that were left out: how many for each reason, and where the first of them stands."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, place)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        return "; ".join(f"{count} x {reason} (first: {self.first[reason]})" for reason, count in self.counts.items())


@dataclass(frozen=True)
class Dataset:
    """A data set as it was read; its contexts are at least one."""

    contexts: tuple[Context, ...]
    skipped: Skipped


def dataset(path: Path, contexts: list[Context], skipped: Skipped) -> Dataset:
    """What a reader returns.

    Raises:
        InputError: nothing is left of the file.
    """
    if not contexts:
        raise InputError(f"{path} has no context with a question and an answer{_because(skipped)}")
    return Dataset(tuple(contexts), skipped)


def _because(skipped: Skipped) -> str:
    return f": {skipped}" if skipped.total else ""


def json_lines(path: Path, skipped: Skipped) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place; lines that are no JSON object are counted.

    Raises:
        InputError: as `read_user_text`.
    """
    # Not splitlines: a text may hold other separators.
    for number, line in enumerate(read_user_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            yield f"{path}:{number}", value
        else:
            skipped.add("line that is no JSON object", f"{path}:{number}")


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with its columns by name, each with the line that it ends on; a short row has empty ends.

    Raises:
        InputError: as `read_user_text`; a column is missing, or it is no CSV.
    """
    reader = csv.DictReader(io.StringIO(read_user_text(path), newline=""), strict=True, restval="")
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise InputError(f"{path} must have the columns {', '.join(columns)}, but {missing[0]!r} is missing")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num} is no CSV: {error}") from error


def text_of(value: object) -> str:
    """A text without space around it; empty for anything that is no text."""
    return value.strip() if isinstance(value, str) else ""


def list_of(value: object) -> list[Any]:
    """A list; empty for anything that is no list."""
    return value if isinstance(value, list) else []


def texts_of(value: object) -> tuple[str, ...]:
    """The texts of a list that are not empty."""
    return tuple(filter(None, map(text_of, list_of(value))))
