"""The learning-rate schedule."""

import pytest
import torch

from gakernels.training.schedule import warmup_then_linear_decay


def test_values_at_the_borders() -> None:
    total = int(torch.randint(20, 1000, ()))
    warmup = int(torch.randint(1, total - 1, ()))
    assert warmup_then_linear_decay(0, warmup, total) == pytest.approx(1 / warmup)
    assert warmup_then_linear_decay(warmup - 1, warmup, total) == 1
    assert warmup_then_linear_decay(warmup, warmup, total) == 1
    assert warmup_then_linear_decay(total - 1, warmup, total) == pytest.approx(1 / (total - warmup))
    assert warmup_then_linear_decay(total, warmup, total) == 0


def test_the_area_is_that_of_two_triangles() -> None:
    total = int(torch.randint(20, 1000, ()))
    warmup = int(torch.randint(1, total, ()))
    area = sum(warmup_then_linear_decay(step, warmup, total) for step in range(total))
    assert area == pytest.approx((warmup + 1) / 2 + (total - warmup + 1) / 2)


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert [warmup_then_linear_decay(step, 0, 4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


def test_a_warmup_longer_than_the_run_only_rises() -> None:
    assert [warmup_then_linear_decay(step, 8, 4) for step in range(4)] == [1 / 8, 2 / 8, 3 / 8, 4 / 8]
