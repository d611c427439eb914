"""Records of JSON-lines and Parquet files: the values of each line or row, by name."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gakernels.data.bad_records import BadRecords
from gakernels.data.compression import kind_of, opened
from gakernels.data.files import PARQUET
from gakernels.errors import InputError
from gakernels.user_text import utf8_lines

UNREADABLE = "file that can't be read to its end"


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        entries: its values by name.
        place: file and line or row, for messages.
    """

    entries: dict[str, Any]
    place: str


def read_records(path: Path, bad: BadRecords, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of a Parquet file, or of a file of JSON lines, one object per line.

    JSON lines are UTF-8, or UTF-16 with a byte order mark; empty lines are allowed.

    Args:
        path: `.parquet` is read as Parquet, anything else as JSON lines, decompressed according to its suffix.
        bad: counts what is not a record, and files that are cut off.
        columns: of a Parquet file, the columns to read; None for all.

    Raises:
        InputError: a package that the format needs is not installed; with `bad.strict`, the first bad record.
    """
    read = _rows(path, bad, columns) if kind_of(path) in PARQUET else _lines(path, bad)
    try:
        yield from read
    except OSError as error:
        bad.add(UNREADABLE, f"{path} ({error})")


def _lines(path: Path, bad: BadRecords) -> Iterator[Record]:
    with opened(path) as file:
        for number, line in enumerate(utf8_lines(file), 1):
            if not line.strip():
                continue
            place = f"line {number} of {path}"
            try:
                entries = json.loads(line.decode())
            except UnicodeDecodeError:
                bad.add("line that is not UTF-8", place)
            except (ValueError, RecursionError):
                bad.add("line that is not JSON", place)
            else:
                if isinstance(entries, dict):
                    yield Record(entries, place)
                else:
                    bad.add("line that is not a JSON object", place)


def _rows(path: Path, bad: BadRecords, columns: Sequence[str] | None) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"reading {path} needs the package pyarrow: pip install 'gakernels[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            missing = set(columns or ()) - set(file.schema_arrow.names)
            if missing:
                there = ", ".join(file.schema_arrow.names)
                bad.add(f"Parquet file without the column {', '.join(sorted(missing))}", f"{path} (it has {there})")
                return
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in range(batch.num_rows):
                    number += 1
                    place = f"row {number} of {path}"
                    try:
                        entries = {name: batch[name][row].as_py() for name in batch.schema.names}
                    except UnicodeDecodeError:
                        bad.add("row that is not UTF-8", place)
                    else:
                        yield Record(entries, place)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error
