"""Cutting contexts into chunks and padding them."""

import math
import random

import pytest
import torch

from gakernels import InputError
from gakernels.model.windows import pad_left, pad_windows, split_evenly


@pytest.mark.parametrize("_", range(50))
def test_chunks_are_even_small_enough_few_and_complete(_: int) -> None:
    size, tokens = int(torch.randint(1, 12, ())), torch.randint(0, 99, (int(torch.randint(1, 80, ())),)).tolist()
    chunks = split_evenly(tokens, size)
    assert [token for chunk in chunks for token in chunk] == tokens
    assert all(1 <= len(chunk) <= size for chunk in chunks)
    assert len({len(chunk) for chunk in chunks[:-1]}) <= 1
    assert len(chunks[-1]) <= len(chunks[0])
    assert len(chunks) <= math.ceil(len(tokens) / size)


@pytest.mark.parametrize(
    ("count", "size", "lengths"), [(8, 4, [4, 4]), (9, 4, [3, 3, 3]), (10, 4, [4, 4, 2]), (1, 4, [1]), (4, 1, [1] * 4)]
)
def test_known_cuts(count: int, size: int, lengths: list[int]) -> None:
    assert [len(chunk) for chunk in split_evenly(range(count), size)] == lengths


def test_no_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="at least one token"):
        split_evenly([], 4)


def test_windows_are_padded_on_the_right_and_with_empty_chunks() -> None:
    ids, mask = pad_windows([[[5, 6, 7], [8]], [[9, 3]]], pad=1)
    assert ids.tolist() == [[[5, 6, 7], [8, 1, 1]], [[9, 3, 1], [1, 1, 1]]]
    assert mask.tolist() == [[[True] * 3, [True, False, False]], [[True, True, False], [False] * 3]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("_", range(10))
def test_padding_keeps_every_token_in_its_place(_: int) -> None:
    rows = [
        [[random.randrange(99) for _ in range(random.randint(1, 5))] for _ in range(random.randint(1, 4))]
        for _ in "abc"
    ]
    ids, mask = pad_windows(rows, pad=-1)
    kept = [[ids[i, j][mask[i, j]].tolist() for j in range(ids.shape[1]) if mask[i, j].any()] for i in range(3)]
    assert kept == rows
    assert (ids[~mask] == -1).all()
    assert ids.shape[2] == max(len(chunk) for row in rows for chunk in row)


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = pad_left([[4, 5, 6], [7]], pad=2)
    assert ids.tolist() == [[4, 5, 6], [2, 2, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
