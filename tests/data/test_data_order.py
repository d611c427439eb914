"""Which segments a step takes."""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from writing import drawn

from gakernels import InputError
from gakernels.data import ShuffledOrder
from gakernels.data.order import permuted


def assert_uniform(draws: Iterable[Hashable], cells: int) -> None:
    """Chi-square of the counts; a uniform draw is above the bound with a probability below 1e-8 (Laurent, Massart)."""
    counts = Counter(draws)
    expected = counts.total() / cells
    assert expected >= 20
    statistic = sum((count - expected) ** 2 / expected for count in counts.values()) + (cells - len(counts)) * expected
    assert statistic < cells - 1 + 2 * math.sqrt((cells - 1) * 20) + 2 * 20


@given(count=st.integers(1, 500), key=st.text(max_size=5))
@settings(deadline=None, max_examples=50)
def test_the_permutation_is_one(count: int, key: str) -> None:
    assert sorted(permuted(place, count, key) for place in range(count)) == list(range(count))


@given(count=st.integers(1, 10**15), data=st.data())
@settings(deadline=None, max_examples=50)
def test_it_stays_in_a_range_of_any_size_and_takes_no_two_to_one(count: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=20))
    images = [permuted(place, count, "key") for place in places]
    assert all(0 <= image < count for image in images)
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_order_of_a_few_is_as_likely(count: int) -> None:
    seed, orders = drawn(0, 10**6), math.factorial(count)
    draws = [
        tuple(permuted(place, count, f"{seed} {number}") for place in range(count)) for number in range(60 * orders)
    ]
    assert_uniform(draws, orders)


def test_each_segment_comes_anywhere_with_the_same_probability() -> None:
    count, first = drawn(30, 60), drawn(0, 10**6)
    order, place = ShuffledOrder(count), drawn(0, count)
    assert_uniform((order.index(place, seed) for seed in range(first, first + 60 * count)), count)
    assert_uniform((order.index(epoch * count + place, first) for epoch in range(60 * count)), count)


def test_neighbours_are_not_kept_together() -> None:
    count, seed = 60_000, drawn(0, 10**6)
    order = ShuffledOrder(count)
    steps = ((order.index(place + 1, seed) - order.index(place, seed)) % count for place in range(4000))
    assert_uniform((step * 50 // count for step in steps), 50)


def numbers(count: int, batch_size: int, steps: range, seed: int) -> list[int]:
    order = ShuffledOrder(count)
    return list(itertools.chain.from_iterable(order.indices(step, batch_size, seed) for step in steps))


def test_every_epoch_is_a_fresh_permutation_also_where_batches_cross_its_border() -> None:
    count, batch_size, seed = drawn(5, 12), drawn(1, 30), drawn(0, 1000)
    order = numbers(count, batch_size, range(60), seed)
    epochs = [order[start : start + count] for start in range(0, len(order) - count + 1, count)]
    assert len(epochs) > 4
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_another_seed_gives_another_order() -> None:
    seed = drawn(0, 1000)
    assert numbers(30, 60, range(1), seed) != numbers(30, 60, range(1), seed + 1)


@given(
    count=st.integers(1, 10**9),
    step=st.integers(0, 10**7),
    part=st.integers(1, 4),
    worlds=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=50)
def test_the_ranks_of_any_world_make_up_the_same_global_batch(
    count: int, step: int, part: int, worlds: list[int], seed: int
) -> None:
    batch_size = part * math.lcm(*worlds)
    whole = ShuffledOrder(count).indices(step, batch_size, seed)
    assert len(whole) == batch_size
    for world in worlds:
        parts = [ShuffledOrder(count).indices(step, batch_size, seed, rank, world) for rank in range(world)]
        assert all(len(taken) == batch_size // world for taken in parts)
        assert list(itertools.chain.from_iterable(parts)) == whole


def test_another_batch_size_goes_through_the_same_sequence() -> None:
    count, seed, batch_size = drawn(5, 40), drawn(0, 1000), drawn(2, 9)
    assert numbers(count, batch_size, range(12), seed) == numbers(count, 1, range(12 * batch_size), seed)


@pytest.mark.parametrize(("batch_size", "world"), [(3, 2), (8, 3), (1, 2), (0, 1)])
def test_a_world_that_does_not_divide_the_batch_is_refused(batch_size: int, world: int) -> None:
    with pytest.raises(
        InputError, match=f"batch_size must be a multiple of the number of processes, {world}, but it is {batch_size}"
    ):
        ShuffledOrder(10).indices(0, batch_size, 0, 0, world)


def test_no_segments_are_refused() -> None:
    with pytest.raises(InputError, match="data: there is no segment to train on"):
        ShuffledOrder(0)


def test_the_order_does_not_change_from_version_to_version() -> None:
    """A run resumed after an update sees the segments that it would have seen."""
    assert ShuffledOrder(10).indices(0, 10, seed=0) == [2, 5, 0, 6, 4, 7, 1, 8, 3, 9]
