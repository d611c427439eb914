"""Files that may be compressed, recognised by the last suffix of their name."""

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gakernels.errors import InputError

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed.

    Raises:
        InputError: the package that its compression needs is not installed.
        OSError: it can't be opened, or is found damaged or truncated during reading.
    """
    module = _module(path)
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError)
    if path.suffix == ".zst":
        damage = (*damage, module.ZstdError)
    try:
        with module.open(path, "rb") if module else path.open("rb") as file:
            yield file
    except damage as error:
        raise OSError(str(error)) from error


def kind_of(path: Path) -> str:
    """The suffix of a file's name without the compression suffix, which shows its format; empty for none."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return suffixes[-1] if suffixes else ""


def _module(path: Path) -> Any:
    if path.suffix == ".zst":
        return _zstd(path)
    return {".gz": gzip, ".xz": lzma, ".bz2": bz2}.get(path.suffix)


def _zstd(path: Path) -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise InputError(f"reading {path} needs the package backports.zstd: pip install 'gakernels[data]'") from error
    return zstd
