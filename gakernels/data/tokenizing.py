"""From documents to blocks of token ids, and how a tokenizer is recognised."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gakernels.data.documents import Document

_BATCH = 1 << 20  # characters given to the tokenizer at once, for its threads to share
_PIECES = 1024


@dataclass(frozen=True)
class TokenBlock:
    """Consecutive tokens of a sequence of documents.

    Attributes:
        ids: (n,) int64.
        starts: where documents begin in the block, at their BOS.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]


def token_blocks(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenBlock]:
    """All documents as one sequence, each between the tokenizer's BOS and EOS, if it has them.

    Pieces of a document, about 64K characters each, are tokenised separately.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(documents):
        texts = [piece.text for piece in batch]
        rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        ids: list[int] = []
        starts: list[int] = []
        for piece, row in zip(batch, rows, strict=True):
            if piece.first:
                starts.append(len(ids))
                ids += start
            ids += row
            if piece.last:
                ids += end
        yield TokenBlock(np.array(ids, np.int64), np.array(starts, np.int64))


def tokenizer_description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Name, vocabulary size and a fingerprint of everything that determines the tokens of a text; JSON types."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str())
        for transient in ("truncation", "padding"):  # set by the last call
            rules.pop(transient, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    digest = hashlib.sha256(json.dumps([rules, special], sort_keys=True).encode())
    return {
        "name": str(tokenizer.name_or_path),
        "vocabulary": len(tokenizer),
        "fingerprint": digest.hexdigest()[:32],
    }


@dataclass(frozen=True)
class _Piece:
    text: str
    first: bool
    last: bool


def _batches(documents: Iterable[Document]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in _pieces(documents):
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH or len(batch) == _PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(documents: Iterable[Document]) -> Iterator[_Piece]:
    for document in documents:
        first = True
        text = next(document)
        for following in document:
            yield _Piece(text, first, last=False)
            text, first = following, False
        yield _Piece(text, first, last=True)
