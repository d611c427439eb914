"""Segments, and which of them a training step sees."""

import pytest
import torch

from gakernels import InputError
from gakernels.training.data import batch_of, cut_segments


def drawn(low: int, high: int) -> int:
    return int(torch.randint(low, high, ()))


def test_segments_are_cut_in_order_and_the_rest_is_left_out() -> None:
    length, count = drawn(1, 20), drawn(1, 10)
    rest = drawn(0, length)
    tokens = torch.randint(100, (count * length + rest,))
    segments = cut_segments(tokens, length)
    assert segments.shape == (count, length)
    assert segments.flatten().tolist() == tokens[: count * length].tolist()


def test_fewer_tokens_than_a_segment_are_refused() -> None:
    length = drawn(2, 20)
    with pytest.raises(InputError, match=rf"data: one segment needs {length} tokens, but there are only {length - 1}"):
        cut_segments(torch.zeros(length - 1), length)


def numbers(count: int, batch_size: int, steps: range, seed: int) -> list[int]:
    segments = torch.arange(count)[:, None].expand(count, 3)
    batches = [batch_of(segments, batch_size, step, seed) for step in steps]
    assert all(batch.shape == (batch_size, 3) for batch in batches)
    return torch.cat(batches)[:, 0].tolist()


def test_every_epoch_is_a_permutation_also_where_batches_cross_its_border() -> None:
    count, batch_size, seed = drawn(5, 12), drawn(1, 30), drawn(0, 1000)
    order = numbers(count, batch_size, range(60), seed)
    epochs = [order[start : start + count] for start in range(0, len(order) - count + 1, count)]
    assert len(epochs) > 4
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_depends_on_step_and_seed_alone() -> None:
    count, seed = drawn(20, 40), drawn(0, 1000)
    step = drawn(5, 50)
    torch.manual_seed(1)
    first = numbers(count, 4, range(step + 2), seed)[-8:]
    torch.manual_seed(2)
    assert numbers(count, 4, range(step, step + 2), seed) == first
    assert numbers(count, 2 * count, range(1), seed) != numbers(count, 2 * count, range(1), seed + 1)
