"""Where instruction data comes from: files and data sets of the hub, as records with one context each."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from gakernels.errors import InputError
from gakernels.paths import expand_fields
from gakernels.training.data.bad_records import BadRecords
from gakernels.training.data.compression import kind_of, opened
from gakernels.training.data.files import JSON_LINES, PARQUET, find_files
from gakernels.training.data.records import UNREADABLE, Record, read_records
from gakernels.training.data.sources import HUB, HubSource, source_of
from gakernels.training.instruction.records import ContextRecord, record_of

_JSON = {".json"}
_KINDS = JSON_LINES | PARQUET | _JSON


@dataclass(frozen=True)
class InstructionSource:
    """One source of a mixture.

    Attributes:
        path: a file or folder of JSON lines, JSON or Parquet, or `hub:dataset[:subset]:split`.
        weight: share of the contexts of a step, relative to the other sources; None for as many as it has, so that all
            sources go round equally often.
        shots: of the items of a task ({"task", "input", "output"}), how many are shown in one context.
        queries: how many further ones are asked for.
    """

    path: str
    weight: float | None = None
    shots: int = 16
    queries: int = 4

    def __post_init__(self) -> None:
        expand_fields(self, "path")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise InputError(f"weight must be above 0, but it is {self.weight}")
        for name in ("shots", "queries"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")


def read_source(source: InstructionSource, bad: BadRecords, seed: int = 0) -> list[ContextRecord]:
    """The records of a source; conversations about the same context become one record.

    Args:
        source: what to read.
        bad: counts what is left out.
        seed: of the order in which the items of a task are put together.

    Raises:
        InputError: there is no such file or data set, or no usable record in it.
    """
    by_context: dict[str, list[Any]] = {}
    for record in _records(source, bad, seed):
        by_context.setdefault(record.context, []).extend(record.conversations)
    if not by_context:
        reasons = f": {bad}" if bad.total else ""
        raise InputError(f"data: {source.path} has no usable record{reasons}")
    return [ContextRecord(context, tuple(dict.fromkeys(said))) for context, said in by_context.items()]


def _records(source: InstructionSource, bad: BadRecords, seed: int) -> Iterator[ContextRecord]:
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(source.path, bad):
        entries = {name: value for name, value in row.entries.items() if value is not None}  # columns have gaps
        if {"task", "input", "output"} <= entries.keys() and "instruction" not in entries:
            tasks.setdefault(str(entries["task"]), []).append(entries)
        elif record := record_of(entries, row.place, bad):
            yield record
    for row in _demonstrations(source, tasks, seed):
        if record := record_of(row.entries, row.place, bad):
            yield record


def _demonstrations(source: InstructionSource, tasks: dict[str, list[dict[str, Any]]], seed: int) -> Iterator[Record]:
    """The items of each task in a drawn order, cut into examples and queries; a short rest asks for its last item."""
    for task, items in tasks.items():
        Random(f"{seed} {task}").shuffle(items)
        size = source.shots + source.queries
        for start in range(0, len(items), size):
            piece = items[start : start + size]
            shown = min(source.shots, len(piece) - 1)
            place = f"task {task!r} of {source.path}, piece {start // size + 1}"
            yield Record({"examples": piece[:shown], "queries": piece[shown:]}, place)


def _rows(path: str, bad: BadRecords) -> Iterator[Record]:
    if path.startswith(HUB):
        hub = source_of(path)
        assert isinstance(hub, HubSource)
        yield from hub.rows()
        return
    for file in find_files(Path(path), _KINDS):
        yield from _json_rows(file, bad) if kind_of(file) in _JSON else read_records(file, bad)


def _json_rows(path: Path, bad: BadRecords) -> Iterator[Record]:
    """The rows of a JSON file: a list of them, or the paragraphs of SQuAD's form."""
    try:
        with opened(path) as file:
            content = json.loads(file.read().decode("utf-8-sig"))
    except OSError as error:
        bad.add(UNREADABLE, f"{path} ({error})")
        return
    except (ValueError, RecursionError) as error:
        bad.add("file that is no JSON", f"{path} ({error})")
        return
    if isinstance(content, list):
        yield from _numbered(content, f"row {{}} of {path}", bad)
    elif isinstance(content, dict) and isinstance(content.get("data"), list):
        for number, article in enumerate(content["data"], 1):
            paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
            place = f"paragraph {{}} of article {number} of {path}"
            yield from _numbered(paragraphs if isinstance(paragraphs, list) else [], place, bad)
    else:
        bad.add("JSON file that is neither a list of rows nor of SQuAD's form", str(path))


def _numbered(rows: Iterable[Any], place: str, bad: BadRecords) -> Iterator[Record]:
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield Record(row, place.format(number))
        else:
            bad.add("row that is no JSON object", place.format(number))
