"""Reading text files from users: UTF-8 with or without a byte order mark, or UTF-16 with one."""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gakernels.errors import InputError

_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def read_user_text(path: Path) -> str:
    """The text of a file, without a byte order mark; line endings become `\\n`.

    Raises:
        InputError: there is no such file, or it is not text; the message gives the offset of the first invalid byte.
    """
    if path.is_dir() or not path.exists():  # a pipe is read like a file
        raise InputError(f"there is no file {path}")
    return decode_user_text(path.read_bytes(), path)


def decode_user_text(data: bytes, path: Path) -> str:
    """Decode the bytes of a file. Raises what `read_user_text` raises."""
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
    """A file as a text stream from its start, for files that do not fit into memory; line endings become `\\n`.

    Reading raises UnicodeDecodeError where the file is not text, and returns NUL bytes as they are.
    """
    is_utf16 = file.read(2) in _UTF16
    file.seek(0)
    return io.TextIOWrapper(file, encoding="utf-16" if is_utf16 else "utf-8-sig")


def utf8_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file as UTF-8 bytes, without a byte order mark; a line may still be invalid UTF-8.

    Raises:
        OSError: the file starts with a UTF-16 byte order mark but is not valid UTF-16.
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
        raise OSError(f"it is not UTF-16: {error.reason}") from error
