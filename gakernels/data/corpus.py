"""Tokens of documents one after the other, in memory or in a file, and selections of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gakernels.errors import InputError

_BLOCK = 1 << 22  # tokens read at once


@dataclass(frozen=True, eq=False)
class Corpus:
    """A sequence of tokens that knows where its documents begin.

    Attributes:
        ids: integers, in memory or mapped from a file; each document is a range of it.
        places: (documents,) where in `ids` each document begins.
        offsets: (documents + 1,) where each document begins in this corpus, then the number of all tokens.
        document_ids: (documents,) their numbers; in a selection they are the numbers in the whole corpus.
        fingerprint: hash of the tokens and the document boundaries.
    """

    ids: NDArray[Any]
    places: NDArray[np.int64]
    offsets: NDArray[np.int64]
    document_ids: NDArray[np.int64]
    fingerprint: str

    @classmethod
    def of(cls, documents: Sequence[Tensor]) -> "Corpus":
        """A corpus in memory, from the token ids (n,) of each document."""
        offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        ids = torch.cat(list(documents)).long().cpu().numpy()
        fingerprint = hashlib.sha256(ids.tobytes() + offsets.tobytes()).hexdigest()[:32]
        return cls(ids, offsets[:-1], offsets, np.arange(len(documents)), fingerprint)

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return int(self.offsets[-1])

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.document_ids)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens `start` to `start + count`, which must exist, int64."""
        end = start + count
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, end, side="left")) - 1
        if self.places[last] - self.places[first] == self.offsets[last] - self.offsets[first]:  # one contiguous range
            place = int(self.places[first] + start - self.offsets[first])
            return self.ids[place : place + count].astype(np.int64)
        half = int(self.offsets[(first + last + 1) // 2])
        return np.concatenate([self.read(start, half - start), self.read(half, end - half)])

    def document_of(self, token: int) -> int:
        """The number of the first document that contains a token id; the id must occur."""
        for start in range(0, self.tokens, _BLOCK):
            found = np.flatnonzero(self.read(start, min(_BLOCK, self.tokens - start)) == token)
            if len(found):
                return int(self.document_ids[np.searchsorted(self.offsets, start + found[0], side="right") - 1])
        raise ValueError(f"no document has the token {token}")

    def select(self, kept: NDArray[np.bool_]) -> "Corpus":
        """A selection of the documents, without copying the tokens.

        Args:
            kept: (documents,) which documents to keep.
        """
        lengths = np.diff(self.offsets)[kept]
        fingerprint = hashlib.sha256(self.fingerprint.encode() + kept.tobytes()).hexdigest()[:32]
        return Corpus(
            self.ids,
            self.places[kept],
            np.concatenate([[0], np.cumsum(lengths)]),
            self.document_ids[kept],
            fingerprint,
        )


def hold_out_documents(corpus: Corpus, every: int) -> tuple[Corpus, Corpus]:
    """All documents but every k-th, and every k-th document.

    Raises:
        InputError: `every` is below 2, or there are fewer documents than `every`.
    """
    if every < 2:
        raise InputError(f"held-out documents must be every 2nd or fewer, but every is {every}")
    if corpus.documents < every:
        raise InputError(
            f"data: every {every}th document is to be held out, but there are only {corpus.documents} documents"
        )
    held_out = np.arange(1, corpus.documents + 1) % every == 0
    return corpus.select(~held_out), corpus.select(held_out)
