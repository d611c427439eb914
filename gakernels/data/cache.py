"""A token cache: the tokens of a source in files that are mapped into memory (docs/pretraining.md)."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gakernels.data.bad_records import BadRecords
from gakernels.data.corpus import Corpus
from gakernels.data.sources import Source
from gakernels.data.tokenizing import tokenizer_description
from gakernels.errors import FormatError, InputError
from gakernels.files import count_entry, entry

FORMAT_VERSION = 1
DESCRIPTION = "cache.json"  # names the other files, so a cache is complete once this one is in place
TOKENS, DOCUMENTS = ".tokens", ".documents"
OFFSET = np.dtype("<i8")
_BLOCK = 1 << 22  # numbers
_DTYPES = ("<u2", "<u4")


@dataclass(frozen=True)
class TokenCache:
    """A cache on disk.

    Attributes:
        folder: its folder.
        description: the contents of `cache.json`.
        corpus: its tokens, mapped into memory.
    """

    folder: Path
    description: Mapping[str, Any]
    corpus: Corpus

    @classmethod
    def open(cls, folder: Path) -> "TokenCache":
        """The cache in a folder.

        Raises:
            InputError: there is none.
            FormatError: it is damaged, or its format is newer.
        """
        description = read_description(folder)
        return cls(folder, description, _corpus(folder, description))

    @contextmanager
    def _described(self, name: str) -> Iterator[Any]:
        """An entry of the description, for a block that may assume it is undamaged."""
        try:
            yield self.description[name]
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{self.folder / DESCRIPTION} is damaged: its entry {name!r} can't be read") from error

    def check_numbers(self) -> None:
        """Read everything, one to two seconds per gigabyte. Raises: FormatError: it is not as it was written."""
        digests = [_sha256(numbers) for numbers in (self.corpus.ids, self.corpus.offsets)]
        if fingerprint_of(digests) != self.corpus.fingerprint:
            raise FormatError(
                f"the token cache {self.folder} is damaged: its numbers do not match the checksum in {DESCRIPTION}; "
                "remove it, and it is made again"
            )

    @property
    def bad_records(self) -> BadRecords:
        """The records of the source that could not be used."""
        with self._described("bad_records") as counts:
            return BadRecords.from_dict(counts)

    @property
    def largest_token(self) -> int:
        """The largest token id: the vocabulary of the base model must be larger."""
        return count_entry(self.folder / DESCRIPTION, self.description, "largest_token")

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises: InputError: the tokens come from another tokenizer."""
        given = tokenizer_description(tokenizer)
        with self._described("tokenizer") as ours:
            if ours["fingerprint"] != given["fingerprint"]:
                raise InputError(
                    f"the token cache {self.folder} was made with another tokenizer: {_in_words(ours)}, but the model "
                    f"has {_in_words(given)}; remove it or name another folder"
                )

    def check_source(self, source: Source) -> None:
        """Raises: InputError: the tokens come from another source, or the source has changed."""
        with self._described("source") as described:
            change = source.change(described)
        if change is not None:
            raise InputError(
                f"the token cache {self.folder} no longer matches {source.name}: {change}; remove it or name "
                "another folder"
            )


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of `cache.json`. Raises: as `TokenCache.open`."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(f"there is no token cache in {folder}")
    try:
        description = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(description, dict) or description.get("kind") != "token_cache":
        raise FormatError(f"{path} does not describe a token cache")
    version = count_entry(path, description, "format_version")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {version}, and this version reads up to {FORMAT_VERSION}: upgrade gakernels"
        )
    for name in ("tokenizer", "source", "bad_records"):
        entry(path, description, name, dict)
    return description


def _corpus(folder: Path, description: Mapping[str, Any]) -> Corpus:
    path = folder / DESCRIPTION
    name, dtype, fingerprint = (entry(path, description, key, str) for key in ("files", "dtype", "fingerprint"))
    if dtype not in _DTYPES:
        raise FormatError(f"{path} is damaged: its entry 'dtype' must be one of {_DTYPES}, but it is {dtype!r}")
    documents = count_entry(path, description, "documents", 1)
    ids = _mapped(folder / f"{name}{TOKENS}", np.dtype(dtype), count_entry(path, description, "tokens", 1))
    offsets = _mapped(folder / f"{name}{DOCUMENTS}", OFFSET, documents + 1)
    if offsets[0] != 0 or offsets[-1] != len(ids):
        raise FormatError(f"{folder / name}{DOCUMENTS} is damaged: it must lead from 0 to {len(ids)}")
    return Corpus(ids, offsets[:-1], offsets, np.arange(documents), fingerprint)


def fingerprint_of(digests: Sequence[str]) -> str:
    """The fingerprint of a cache, from the SHA-256 of its two files."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:32]


def _sha256(numbers: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(numbers), _BLOCK):
        digest.update(numbers[start : start + _BLOCK].data)
    return digest.hexdigest()


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    size = path.stat().st_size if path.is_file() else None
    if size != count * dtype.itemsize:
        there = "it is missing" if size is None else f"it has {size} bytes"
        raise FormatError(f"{path} is damaged: it must have {count * dtype.itemsize} bytes, but {there}")
    return np.memmap(path, dtype, mode="r")


def _in_words(tokenizer: Mapping[str, Any]) -> str:
    return f"{tokenizer['name'] or 'no name'} ({tokenizer['vocabulary']} tokens, {tokenizer['fingerprint'][:8]})"
