"""Several sources as one."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from writing import drawn

from gakernels import InputError
from gakernels.data import Corpus, JoinedSegments, MixedOrder, packed_segments


def corpus(tokens: int, documents: int = 3) -> Corpus:
    parts = torch.randint(1000, (tokens,)).tensor_split(documents)
    return Corpus.of(parts)


def test_joined_segments_are_those_of_the_parts_one_after_the_other() -> None:
    length = drawn(2, 9)
    parts = [packed_segments(corpus(drawn(10, 60)), length) for _ in range(3)]
    joined = JoinedSegments(parts)
    assert len(joined) == sum(map(len, parts))
    assert joined.length == length
    expected = torch.cat([part.take(range(len(part))) for part in parts])
    picked = torch.randint(len(joined), (20,)).tolist()
    assert joined.take(picked).equal(expected[picked])
    ids = np.split(joined.document_ids, np.cumsum([len(part) for part in parts])[:-1])
    for one, other in itertools.combinations(ids, 2):
        assert not set(one) & set(other)
    for part, own in zip(parts, ids, strict=True):
        assert np.array_equal(part.document_ids - part.document_ids[0], own - own[0])
    assert JoinedSegments(parts).fingerprint == joined.fingerprint
    assert JoinedSegments(parts[::-1]).fingerprint != joined.fingerprint


def test_parts_of_different_lengths_are_refused() -> None:
    with pytest.raises(InputError, match=r"segments of a mixture must have one length, but they have \[2, 3\]"):
        JoinedSegments([packed_segments(corpus(20), 2), packed_segments(corpus(20), 3)])


def sequence(order: MixedOrder, count: int, seed: int) -> list[int]:
    return order.indices(0, count, seed)


def test_each_part_has_its_share_and_every_segment_of_it_comes_once_before_one_comes_again() -> None:
    counts, seed = [drawn(1, 30), drawn(100, 300), drawn(1000, 3000)], drawn(0, 1000)
    weights = [float(drawn(1, 9)) for _ in counts]
    taken = sequence(MixedOrder(counts, weights), 3000, seed)
    start = 0
    for count, weight in zip(counts, weights, strict=True):
        own = [index - start for index in taken if start <= index < start + count]
        assert abs(len(own) - 3000 * weight / sum(weights)) <= 3
        for epoch in range(0, len(own), count):
            assert len(set(own[epoch : epoch + count])) == len(own[epoch : epoch + count])
        start += count


def test_the_parts_take_turns_at_random_places() -> None:
    order, seed = MixedOrder([10, 10], [1, 1]), drawn(0, 1000)
    turns = [index // 10 for index in sequence(order, 20_000, seed)]
    runs = Counter(len(list(run)) for _, run in itertools.groupby(turns))
    total = runs.total()
    for length in (1, 2, 3):  # of fair coins a half, a quarter, an eighth
        expected = 0.5**length
        assert abs(runs[length] / total - expected) < 6 * math.sqrt(expected / total) + 0.002
    assert sequence(order, 100, seed) != sequence(order, 100, seed + 1)


def test_it_is_a_function_of_the_step_also_across_ranks() -> None:
    counts, weights, seed = [7, 40], [1.0, 2.5], drawn(0, 1000)
    whole = sequence(MixedOrder(counts, weights), 4 * 700, seed)
    for step in [*torch.randint(700, (5,)).tolist(), 0]:
        order = MixedOrder(counts, weights)  # knows of no other step
        assert order.indices(step, 4, seed) == whole[4 * step : 4 * step + 4]
        assert [order.indices(step, 4, seed, rank, 2) for rank in (0, 1)] == [
            whole[4 * step : 4 * step + 2],
            whole[4 * step + 2 : 4 * step + 4],
        ]
    with pytest.raises(InputError, match="batch_size must be a multiple of the number of processes, 3, but it is 4"):
        MixedOrder(counts, weights).indices(0, 4, seed, 0, 3)


@pytest.mark.parametrize(
    ("counts", "weights", "message"),
    [
        ([3, 4], [1.0], r"weights must be one for each of 2 sources, but they are \[1\.0\]"),
        ([3, 4], [1.0, 0.0], r"weights must be positive numbers, but they are \[1\.0, 0\.0\]"),
        ([3, 4], [1.0, math.nan], "weights must be positive numbers"),
        ([3, 4], [1.0, math.inf], "weights must be positive numbers"),
        ([3, 4], [1.0, 1e-4], "each weight must be at least 1/1000 of their sum"),
        ([3, 0], [1.0, 1.0], "there is no segment to train on"),
    ],
)
def test_weights_that_make_no_sense_are_refused(counts: list[int], weights: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MixedOrder(counts, weights)
