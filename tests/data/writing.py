"""Data files of every kind, for the tests that read them."""

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd.compress,
}


def drawn(low: int, high: int) -> int:
    """A number from `low` to `high - 1`."""
    return int(torch.randint(low, high, ()))


def json_lines(texts: Sequence[Any], key: str = "text") -> bytes:
    """One object a line, with the text beside something else."""
    return "".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(texts)).encode()


def write(path: Path, data: bytes) -> Path:
    """The file, compressed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESSORS[path.suffix if path.suffix in COMPRESSORS else ""](data))
    return path
