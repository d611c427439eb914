"""Documents: the texts of files and records, in pieces, so that a file larger than memory can be one document."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

from gakernels.data.bad_records import BadRecords
from gakernels.data.compression import kind_of, opened
from gakernels.data.files import JSON_LINES, PARQUET
from gakernels.data.records import UNREADABLE, Record, read_records
from gakernels.user_text import as_text

PIECE = 1 << 16  # characters; a tokenizer works on many pieces at once, and a text of gigabytes never fills the memory

Document: TypeAlias = Iterator[str]
"""The pieces of one text, cut at line ends. Use them up before you ask for the next document."""


def file_documents(path: Path, text_key: str, bad: BadRecords) -> Iterator[Document]:
    """The documents of a file: the text of each record of JSON lines or Parquet; the whole of any other file.

    Blank texts are left out.

    Args:
        path: the file.
        text_key: the entry of a record that holds the text.
        bad: counts what can't be used.
    """
    if kind_of(path) in JSON_LINES | PARQUET:
        yield from record_documents(read_records(path, bad, [text_key]), text_key, bad)
        return
    try:
        fault = _fault_of_text(path)
    except OSError as error:
        bad.add(UNREADABLE, f"{path} ({error})")
        return
    if fault is None:
        yield _pieces_of_file(path)
    elif fault:
        bad.add(fault, str(path))


def record_documents(records: Iterable[Record], text_key: str, bad: BadRecords) -> Iterator[Document]:
    """The text of each record, see `file_documents`."""
    for record in records:
        text = record.entries.get(text_key)
        if not isinstance(text, str):
            there = ", ".join(map(str, record.entries))
            bad.add(f"record whose {text_key!r} entry is not text", f"{record.place} (entries: {there:.100})")
        elif "\0" in text:
            bad.add("text with NUL bytes", record.place)
        elif not _is_unicode(text):
            bad.add("text with half of a surrogate pair", record.place)
        elif text.strip():
            yield pieces_of(text)


def pieces_of(text: str, size: int = PIECE) -> Document:
    """The text in pieces, each up to the first line end after `size` characters; without line ends it is one piece."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fault_of_text(path: Path) -> str | None:
    """Why a file is not text; None if it is text, and empty if it is blank."""
    blank = True
    try:
        with opened(path) as file:
            text = as_text(file)
            while block := text.read(PIECE):
                if "\0" in block:
                    return "file with NUL bytes (not a text?)"
                blank = blank and not block.strip()
    except UnicodeDecodeError:
        return "text file that is not UTF-8"
    return "" if blank else None


def _pieces_of_file(path: Path) -> Document:
    with opened(path) as file:
        text = as_text(file)
        while piece := text.read(PIECE):
            yield piece + text.readline()
