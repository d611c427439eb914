"""Text files that users write: UTF-8 with or without a byte order mark, or UTF-16 with one."""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gakernels.errors import InputError

_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def read_user_text(path: Path) -> str:
    """The text of a file, without a byte order mark; line ends become `\\n`.

    Raises:
        InputError: there is no such file, or it is no text; the message names the first wrong byte, counted from 0.
    """
    if path.is_dir() or not path.exists():  # a pipe is read like a file
        raise InputError(f"there is no file {path}")
    return decode_user_text(path.read_bytes(), path)


def decode_user_text(data: bytes, path: Path) -> str:
    """The text that the bytes of a file stand for. Raises as `read_user_text`."""
    encoding = _UTF16.get(data[:2], "utf-8")
    first = 2 if data[:2] in _UTF16 else 3 if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[first:].decode(encoding)
    except UnicodeDecodeError as error:
        hint = " (UTF-16 must begin with a byte order mark)"
        expected, hint = ("UTF-8 text", hint) if encoding == "utf-8" else ("UTF-8 text, or UTF-16 as it is marked", "")
        raise InputError(
            f"{path} must be {expected}, but it can't be read as such{hint}: byte {first + error.start} is wrong"
        ) from error
    if "\0" in text:
        place = first + len(text[: text.index("\0")].encode(encoding))
        raise InputError(
            f"{path} must be text, but it holds NUL bytes (binary, or UTF-16 without a mark?): byte {place} is one"
        )
    return io.StringIO(text, newline=None).read()


def as_text(file: IO[bytes]) -> io.TextIOWrapper:
    """A file at its beginning as text, for what does not fit into memory; line ends become `\\n`.

    Reading it raises UnicodeDecodeError where it is no text, and gives NUL bytes as they are.
    """
    is_utf16 = file.read(2) in _UTF16
    file.seek(0)
    return io.TextIOWrapper(file, encoding="utf-16" if is_utf16 else "utf-8-sig")


def utf8_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file in UTF-8, without a byte order mark; each may still be no UTF-8 of its own.

    Raises:
        OSError: it has the byte order mark of UTF-16, but is not.
    """
    is_utf16 = file.read(2) in _UTF16
    file.seek(0)
    if not is_utf16:
        for number, line in enumerate(file):
            yield line if number else line.removeprefix(codecs.BOM_UTF8)
        return
    try:
        yield from (line.encode() for line in io.TextIOWrapper(file, encoding="utf-16", newline="\n"))
    except UnicodeDecodeError as error:
        raise OSError(f"it is no UTF-16: {error.reason}") from error
