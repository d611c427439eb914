"""Documents of any text for the perplexities: what is context, and what follows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gakernels.data.compression import opened
from gakernels.errors import InputError
from gakernels.evaluation.records import Skipped, text_of
from gakernels.user_text import decode_user_text, utf8_lines


@dataclass(frozen=True)
class CutDocument:
    """The start of a document.

    Attributes:
        name: where it comes from.
        text: the context.
        context: its token ids.
        following: those of what comes next.
    """

    name: str
    text: str
    context: tuple[int, ...]
    following: tuple[int, ...]


def cut_documents(
    path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int, limit: int | None = None
) -> tuple[list[CutDocument], Skipped]:
    """The first 2 n tokens of documents: n of context, n that follow.

    Args:
        path: JSON lines (`.jsonl`) with a `text` each, which are documents; or plain text, which is cut into pieces of
            2 n tokens one after the other. Also compressed (`.gz`, `.xz`, `.bz2`, `.zst`).
        tokenizer: of the model.
        tokens: n, at least 2.
        limit: most documents.

    Returns:
        The documents, and what was left out: records without text, documents that are too short.

    Raises:
        InputError: n is below 2, the file is missing, no text, or has no document that is long enough.
    """
    if tokens < 2:
        raise InputError(f"tokens must be at least 2, but it is {tokens}")
    documents: list[CutDocument] = []
    skipped = Skipped()
    for name, text in _texts(path, skipped):
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        starts = range(0, len(ids) - 2 * tokens + 1, 2 * tokens)
        if not starts:
            skipped.add(f"document of fewer than {2 * tokens} tokens", name)
        for start in starts if _is_plain(path) else starts[:1]:
            if limit is not None and len(documents) == limit:
                return documents, skipped
            middle, end = start + tokens, start + 2 * tokens
            piece = text[offsets[start][0] : offsets[middle - 1][1]]
            if piece.strip():
                place = f"{name}+{start}" if _is_plain(path) else name
                documents.append(CutDocument(place, piece, tuple(ids[start:middle]), tuple(ids[middle:end])))
    if not documents:
        raise InputError(f"{path} has no document of {2 * tokens} tokens" + (f": {skipped}" if skipped.total else ""))
    return documents, skipped


def _is_plain(path: Path) -> bool:
    return ".jsonl" not in path.suffixes


def _texts(path: Path, skipped: Skipped) -> Iterator[tuple[str, str]]:
    """Names and texts."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with opened(path) as file:
            if _is_plain(path):
                yield path.name, decode_user_text(file.read(), path)
                return
            for number, line in enumerate(utf8_lines(file), 1):
                text = _text_of_line(line, f"{path}:{number}")
                if text:
                    yield f"{path.name}:{number}", text
                elif line.strip():
                    skipped.add("line without a text", f"{path}:{number}")
    except OSError as error:
        raise InputError(f"{path} can't be read: {error}") from error


def _text_of_line(line: bytes, place: str) -> str:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{place} must be UTF-8 text, but byte {error.start} of the line is wrong") from error
    except (ValueError, RecursionError):
        return ""
    return text_of(value.get("text")) if isinstance(value, dict) else ""
