"""Writing a token cache: streamed, so that neither texts nor tokens need to fit in memory; all or nothing."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gakernels.data.bad_records import BadRecords
from gakernels.data.cache import (
    DESCRIPTION,
    DOCUMENTS,
    FORMAT_VERSION,
    OFFSET,
    TOKENS,
    fingerprint_of,
    read_description,
)
from gakernels.data.sources import Source
from gakernels.data.tokenizing import TokenBlock, token_blocks, tokenizer_description
from gakernels.errors import InputError
from gakernels.files import write_text
from gakernels.paths import CACHE_VARIABLE
from gakernels.version import __version__


def write_cache(
    folder: Path, source: Source, tokenizer: PreTrainedTokenizerBase, bad: BadRecords, progress: bool
) -> None:
    """Tokenise a source into a folder, replacing a cache that may be there.

    Tokens go to files with new names; the last step puts a new `cache.json`, which names them, in place. Until then an
    older cache stays intact; the next call removes what an interrupted one left behind.

    Args:
        folder: it must exist, and no other process may write there at the same time.
        source: the documents.
        tokenizer: of the base model.
        bad: counts what can't be used.
        progress: show a bar.

    Raises:
        InputError: the source can't be read or holds no text.
        OSError: it can't be written.
    """
    name = secrets.token_hex(8)
    described = source.description()
    _remove_others(folder)
    try:
        written = _write_tokens(folder / name, source, tokenizer, bad, progress)
        description = {
            "kind": "token_cache",
            "format_version": FORMAT_VERSION,
            "gakernels_version": __version__,
            "files": name,
            **written,
            "tokenizer": tokenizer_description(tokenizer),
            "source": described,
            "bad_records": bad.to_dict(),
        }
        write_text(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    except OSError as error:
        # The error of a full disk names no file; an error of the source names one, or has no number.
        is_ours = error.errno is not None if error.filename is None else folder in Path(error.filename).parents
        if is_ours:
            raise unwritable(folder, error) from error
        raise
    finally:
        _remove_others(folder)


def unwritable(folder: Path, error: OSError) -> OSError:
    """The error for a folder that can't hold the token cache; it suggests a way out."""
    return OSError(
        f"the token cache can't be written to {folder}: {error.strerror or error}; data.cache names another folder for "
        f"it, and {CACHE_VARIABLE} another one for all caches"
    )


def _write_tokens(
    path: Path, source: Source, tokenizer: PreTrainedTokenizerBase, bad: BadRecords, progress: bool
) -> dict[str, Any]:
    """Write the two data files and return what describes them."""
    dtype = np.dtype("<u2" if max(tokenizer.get_vocab().values()) < 1 << 16 else "<u4")
    with path.with_suffix(TOKENS).open("xb") as token_file, path.with_suffix(DOCUMENTS).open("xb") as document_file:
        writer = _Writer(token_file, document_file, dtype)
        with tqdm(desc=f"tokenising {source.name}", unit="token", unit_scale=True, disable=not progress) as bar:
            for block in token_blocks(source.documents(bad), tokenizer):
                writer.add(block)
                bar.update(len(block.ids))
        if writer.tokens == 0:
            reason = f": {bad}" if bad.total else ""
            raise InputError(f"data: {source.name} holds no text that can be used{reason}")
        return writer.finish()


class _Writer:
    """Appends blocks of tokens, and the places where documents begin in them, to two files."""

    def __init__(self, token_file: IO[bytes], document_file: IO[bytes], dtype: np.dtype[Any]) -> None:
        self._files = (token_file, document_file)
        self._dtype = dtype
        self._digests = (hashlib.sha256(), hashlib.sha256())
        self._documents = self._largest = 0
        self.tokens = 0

    def add(self, block: TokenBlock) -> None:
        self._append(0, block.ids.astype(self._dtype))
        self._append(1, (block.starts + self.tokens).astype(OFFSET))
        self.tokens += len(block.ids)
        self._documents += len(block.starts)
        self._largest = max(self._largest, int(block.ids.max(initial=0)))

    def finish(self) -> dict[str, Any]:
        """Flush everything to disk and describe it."""
        self._append(1, np.array([self.tokens], OFFSET))
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return {
            "dtype": self._dtype.str,
            "tokens": self.tokens,
            "documents": self._documents,
            "largest_token": self._largest,
            "fingerprint": fingerprint_of([digest.hexdigest() for digest in self._digests]),
        }

    def _append(self, index: int, values: NDArray[Any]) -> None:
        data = values.tobytes()
        self._files[index].write(data)
        self._digests[index].update(data)


def _remove_others(folder: Path) -> None:
    """Remove what does not belong to the present cache: parts of an unfinished one, files of an earlier one."""
    try:
        name = read_description(folder).get("files")
    except InputError:  # no cache, or a damaged one
        name = None
    for pattern in (f"*{TOKENS}", f"*{DOCUMENTS}", f".{DESCRIPTION}.*.tmp"):
        for path in folder.glob(pattern):
            if path.stem != name:
                path.unlink(missing_ok=True)
