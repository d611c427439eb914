"""Where instruction data comes from: files and data sets of the hub, read as records with one context each."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from gakernels.data.bad_records import BadRecords
from gakernels.data.compression import kind_of, opened
from gakernels.data.conversations import ContextRecord, record_of
from gakernels.data.files import JSON_LINES, PARQUET, find_files
from gakernels.data.records import UNREADABLE, Record, read_records
from gakernels.data.sources import HUB, HubSource, source_of
from gakernels.errors import InputError
from gakernels.files import file_sha256
from gakernels.settings import Count, PathText, Positive, settings
from gakernels.user_text import decode_user_text

NO_JSON, NO_ROWS = "file that is not JSON", "JSON file that is neither a list of rows nor of SQuAD's form"
# Faults of whole files: it is unknown how many rows they cost.
FILE_FAULTS = (UNREADABLE, NO_JSON, NO_ROWS)
_JSON = {".json"}
KINDS = JSON_LINES | PARQUET | _JSON


@settings
class InstructionSource:
    """One source of a mixture.

    Attributes:
        path: a file or folder of JSON lines, JSON or Parquet, or `hub:dataset[:subset]:split`.
        weight: share of the contexts of a step, relative to the other sources; None to use its size, so that all
            sources are repeated equally often.
        shots: how many items of a task ({"task", "input", "output"}) one context shows.
        queries: how many further items to answer.
    """

    path: PathText
    weight: Positive | None = None
    shots: Count = 16
    queries: Count = 4


def read_source(source: InstructionSource, bad: BadRecords, seed: int = 0) -> list[ContextRecord]:
    """The records of a source; conversations about the same context become one record.

    Args:
        source: what to read.
        bad: counts what is left out, and the rows of the source.
        seed: of the order in which the items of a task are combined.

    Raises:
        InputError: there is no such file or data set, or it has no usable record.
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
    for row in _counted(_rows(source.path, bad), bad):
        entries = {name: value for name, value in row.entries.items() if value is not None}  # columns may have gaps
        if {"task", "input", "output"} <= entries.keys() and "instruction" not in entries:
            tasks.setdefault(str(entries["task"]), []).append(entries)
            continue
        before = bad.faults
        record = record_of(entries, row.place, bad)
        parts = bad.faults - before
        bad.lost += 1 if record is None else parts / (parts + len(record.conversations))
        if record is not None:
            yield record
    for row in _demonstrations(source, tasks, seed):
        before = bad.faults
        record = record_of(row.entries, row.place, bad)
        items = len(row.entries["examples"]) + len(row.entries["queries"])
        bad.lost += items if record is None else bad.faults - before
        if record is not None:
            yield record


def _counted(rows: Iterator[Record], bad: BadRecords) -> Iterator[Record]:
    """The rows, counted, as is everything that could not be read as a row."""
    while True:
        before = bad.faults
        row = next(rows, None)
        bad.lost += bad.faults - before
        bad.records += bad.faults - before + (row is not None)
        if row is None:
            return
        yield row


def _demonstrations(source: InstructionSource, tasks: dict[str, list[dict[str, Any]]], seed: int) -> Iterator[Record]:
    """The items of each task in random order, cut into examples and queries.

    Of a last piece of at most `shots` items, only the last item is a query.
    """
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
    for file in find_files(Path(path), KINDS, bad):
        yield from _json_rows(file, bad) if kind_of(file) in _JSON else read_records(file, bad)


def _json_rows(path: Path, bad: BadRecords) -> Iterator[Record]:
    """The rows of a JSON file: a list (also under `data`), paragraphs in SQuAD's form, or one per line."""
    try:
        with opened(path) as file:
            content = json.loads(decode_user_text(file.read(), path))
    except OSError as error:
        bad.add(UNREADABLE, f"{path} ({error})")
        return
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # one complete value, then more
            yield from read_records(path, bad)
        else:
            bad.add(NO_JSON, f"{path} ({error})")
        return
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        bad.add(NO_ROWS, str(path))
        return
    for number, row in enumerate(rows, 1):
        yield from _objects(row, f"row {number} of {path}", bad)


def _objects(row: object, place: str, bad: BadRecords) -> Iterator[Record]:
    """A row; or, if it is an article of SQuAD, its paragraphs."""
    if not isinstance(row, dict):
        bad.add("row that is not a JSON object", place)
    elif isinstance(row.get("paragraphs"), list):
        for number, paragraph in enumerate(row["paragraphs"], 1):
            yield from _objects(paragraph, f"paragraph {number} of {place}", bad)
    else:
        yield Record(row, place)


def source_given(source: InstructionSource, records: Sequence[ContextRecord]) -> dict[str, Any]:
    """How a source was read, from which files, and with what result, in JSON types."""
    rows = hashlib.sha256()
    for record in records:
        rows.update(json.dumps(asdict(record)).encode() + b"\n")
    root = Path(source.path)
    files = [] if source.path.startswith(HUB) else find_files(root, KINDS)
    return {
        "shots": source.shots,
        "queries": source.queries,
        "files": {(file.name if file == root else str(file.relative_to(root))): file_sha256(file) for file in files},
        "rows": rows.hexdigest()[:32],
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences that say what changed between the data of two runs; their sources are under `sources`."""
    found = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - {"sources"})
        if before.get(name) != now.get(name)
    ]
    there, here = before["sources"], now["sources"]
    for name in [*here, *(name for name in there if name not in here)]:
        if name not in there or name not in here:
            found.append(f"the source {name!r} is {'new' if name in here else 'missing'}")
        elif there[name]["rows"] != here[name]["rows"]:
            found.append(f"the source {name!r} has other rows: " + "; ".join(_reasons(there[name], here[name])))
    return found


def _reasons(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    reasons = [
        f"{name} was {before[name]} and is {now[name]}" for name in ("shots", "queries") if before[name] != now[name]
    ]
    there, here = before["files"], now["files"]
    for name in sorted(there.keys() | here.keys()):
        if name not in there or name not in here:
            reasons.append(f"the file {name} is {'new' if name in here else 'missing'}")
        elif there[name] != here[name]:
            reasons.append(f"the file {name} has other contents")
    yield from reasons or ["the data set of the hub has changed, or another version of gakernels reads the files"]
