"""Cutting token sequences into even windows, padded on the right; prompts for generation are padded on the left."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gakernels.errors import InputError


def split_evenly(tokens: Sequence[int], chunk_size: int) -> list[list[int]]:
    """ceil(n / chunk_size) chunks of at most ceil(n / chunks) tokens, in order (as the released code does).

    Raises:
        InputError: there are no tokens.
    """
    if not tokens:
        raise InputError("the context must have at least one token, but it is empty")
    count = math.ceil(len(tokens) / chunk_size)
    size = math.ceil(len(tokens) / count)
    return [list(tokens[start : start + size]) for start in range(0, len(tokens), size)]


def pad_windows(rows: Sequence[Sequence[Sequence[int]]], pad: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, T, M), of B contexts of at most T chunks of at most M tokens; M may be given.

    Missing chunks are empty. The padding id is arbitrary: masked tokens come after all others of their window, so no
    token attends to them.
    """
    chunks = max(len(row) for row in rows)
    length = length or max(len(chunk) for row in rows for chunk in row)
    ids = torch.full((len(rows), chunks, length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), chunks, length), dtype=torch.bool)
    for i, row in enumerate(rows):
        for j, chunk in enumerate(row):
            ids[i, j, : len(chunk)] = torch.tensor(chunk, dtype=torch.int64)
            mask[i, j, : len(chunk)] = True
    return ids, mask


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (int64), both (B, M), for generating from prompts of at most M tokens."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def only_first_is_plain(seen: Sequence[int], chunks: int) -> bool:
    """Whether the first window has no adapter and each of the others has one of 1..chunks."""
    return seen[0] == 0 and all(0 < count <= chunks for count in seen[1:])
