"""Segments: the pieces of T * M tokens that a training step takes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gakernels.data.corpus import Corpus
from gakernels.errors import InputError


class SegmentSet(Protocol):
    """Segments of one length, by number."""

    @property
    def length(self) -> int:
        """Tokens in a segment."""

    @property
    def document_ids(self) -> NDArray[np.int64]:
        """(n,) the document of each segment: that of its first token."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokens of all segments and of their order."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Tensor:
        """The segments of these numbers, (indices, length) int64, on the CPU."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of a corpus; tokens are read only when they are taken.

    Attributes:
        corpus: its tokens.
        length: tokens in a segment.
        starts: (n,) where each begins in the corpus.
        document_ids: (n,) the document of each segment's first token.
    """

    corpus: Corpus
    length: int
    starts: NDArray[np.int64]
    document_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, indices: Sequence[int]) -> Tensor:
        """The segments of these numbers, (indices, length) int64, on the CPU."""
        rows = [self.corpus.read(int(self.starts[index]), self.length) for index in indices]
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, self.length, dtype=torch.int64)

    def select(self, kept: NDArray[np.bool_]) -> "Segments":
        """The segments for which `kept` (n,) is true."""
        return replace(self, starts=self.starts[kept], document_ids=self.document_ids[kept])

    @property
    def dropped(self) -> int:
        """The number of tokens of the corpus that are in none of these segments."""
        return self.corpus.tokens - len(self) * self.length

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokens of all segments and of their order."""
        settings = f"{self.corpus.fingerprint} {self.length}".encode()
        return hashlib.sha256(settings + self.starts.tobytes()).hexdigest()[:32]


def packed_segments(corpus: Corpus, length: int) -> Segments:
    """Segments cut from the concatenated documents, as in the paper; only the remainder at the end is left out.

    Raises:
        InputError: there are fewer tokens than one segment needs, or the length is 0.
    """
    _check_length(length)
    count = corpus.tokens // length
    _check(count, length, f"there are only {corpus.tokens}")
    starts = np.arange(count) * length
    documents = np.searchsorted(corpus.offsets, starts, side="right") - 1
    return Segments(corpus, length, starts, corpus.document_ids[documents])


def document_segments(corpus: Corpus, length: int) -> Segments:
    """Segments that lie within one document; the remainder of each document is left out.

    Raises:
        InputError: no document has enough tokens for a segment, or the length is 0.
    """
    _check_length(length)
    lengths = np.diff(corpus.offsets)
    counts = lengths // length
    count = int(counts.sum())
    _check(count, length, f"the longest of {corpus.documents} documents has only {lengths.max(initial=0)}")
    within = np.arange(count) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(corpus.offsets[:-1], counts) + within * length
    return Segments(corpus, length, starts, np.repeat(corpus.document_ids, counts))


def _check_length(length: int) -> None:
    if length < 1:
        raise InputError(f"the length of a segment must be at least 1, but it is {length}")


def _check(count: int, length: int, there: str) -> None:
    if count == 0:
        raise InputError(f"data: one segment needs {length} tokens, but {there}")
