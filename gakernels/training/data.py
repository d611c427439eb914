"""Text files to token segments for pretraining."""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gakernels.errors import InputError

_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_TEXT, _LINES = {".txt", ".md", ".text"}, {".jsonl", ".ndjson"}


def find_files(path: Path) -> list[Path]:
    """The text and JSON-lines files of a folder and its subfolders, in the order of their names; or the one file.

    Raises:
        InputError: the path does not exist or holds no such file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"data: there is no file or folder {path}")
    files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in _TEXT | _LINES)
    if not files:
        raise InputError(
            f"data: {path} holds no file that ends in {', '.join(sorted(_TEXT | _LINES))} (or .gz, .xz, .bz2)"
        )
    return files


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """The documents of a file: each line's text of a JSON-lines file, the whole of a text file.

    Raises:
        InputError: the file is empty, can't be read, is not UTF-8 text, or a line is no JSON object with a text.
    """
    empty = True
    try:
        with _open(path) as file:
            if _kind(path) in _LINES:
                documents: Iterator[str] = _lines(path, file, text_key)
            else:
                documents = iter([file.read()])
            for document in documents:
                if "\0" in document:
                    raise InputError(f"data: {path} must be text, but it holds NUL bytes (a binary file?)")
                if document.strip():
                    empty = False
                    yield document
    except UnicodeDecodeError as error:
        raise InputError(f"data: {path} must be UTF-8 text, but it can't be read as such: {error}") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"data: {path} can't be read: {error}") from error
    if empty:
        raise InputError(f"data: {path} is empty")


def _lines(path: Path, file: IO[str], text_key: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_key]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise InputError(f"data: line {number} of {path} must be a JSON object whose {text_key!r} entry is a text")
        yield text


def _open(path: Path) -> IO[str]:
    return _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig")  # with or without a byte order mark


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _OPENERS]
    return suffixes[-1] if suffixes else ""


def tokenize_files(files: list[Path], tokenizer: PreTrainedTokenizerBase, progress: bool = True) -> Tensor:
    """All documents as one sequence of token ids (n,), each between the tokenizer's BOS and EOS where it has them.

    Long documents are tokenised in pieces cut at line ends, which bounds the memory.
    """
    pieces: list[np.ndarray] = []
    for file in tqdm(files, desc="tokenising", unit="file", disable=not progress):
        for document in read_documents(file):
            pieces.append(_tokens([tokenizer.bos_token_id]))
            for part in _pieces(document):
                pieces.append(_tokens(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]))
            pieces.append(_tokens([tokenizer.eos_token_id]))
    return torch.from_numpy(np.concatenate(pieces)).long()


def _tokens(ids: list[int | None]) -> np.ndarray:
    return np.array([token for token in ids if token is not None], dtype=np.int32)


def _pieces(document: str, size: int = 1 << 16) -> Iterator[str]:
    start = 0
    while start < len(document):
        end = document.find("\n", start + size)
        end = len(document) if end < 0 else end + 1
        yield document[start:end]
        start = end


def cut_segments(tokens: Tensor, segment_tokens: int) -> Tensor:
    """Whole segments (n, segment_tokens) from a token sequence; a rest shorter than a segment is left out.

    Raises:
        InputError: there are fewer tokens than one segment.
    """
    count = len(tokens) // segment_tokens
    if count == 0:
        raise InputError(f"data: one segment needs {segment_tokens} tokens, but there are only {len(tokens)}")
    return tokens[: count * segment_tokens].view(count, segment_tokens)


def batch_of(segments: Tensor, batch_size: int, step: int, seed: int) -> Tensor:
    """The segments (batch_size, tokens) of a training step: every epoch is a fresh permutation.

    It depends on the step and the seed alone, so a run that is resumed sees what it would have seen.
    """
    count = len(segments)
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders: dict[int, Tensor] = {}
    for epoch in {position // count for position in positions}:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        orders[epoch] = torch.randperm(count, generator=generator)
    return segments[[int(orders[position // count][position % count]) for position in positions]]
