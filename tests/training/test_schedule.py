"""The learning-rate schedule."""

import math
from typing import get_args

import pytest
import torch

from gakernels import InputError
from gakernels.training.step import learning_rate_factor
from gakernels.training.trainer_config import Schedule


def test_values_at_the_borders() -> None:
    total = int(torch.randint(20, 1000, ()))
    warmup = int(torch.randint(1, total - 1, ()))
    assert learning_rate_factor("linear", 0, warmup, total) == pytest.approx(1 / warmup)
    assert learning_rate_factor("linear", warmup - 1, warmup, total) == 1
    assert learning_rate_factor("linear", warmup, warmup, total) == 1
    assert learning_rate_factor("linear", total - 1, warmup, total) == pytest.approx(1 / (total - warmup))
    assert learning_rate_factor("linear", total, warmup, total) == 0


def test_the_area_is_that_of_two_triangles() -> None:
    total = int(torch.randint(20, 1000, ()))
    warmup = int(torch.randint(1, total, ()))
    area = sum(learning_rate_factor("linear", step, warmup, total) for step in range(total))
    assert area == pytest.approx((warmup + 1) / 2 + (total - warmup + 1) / 2)


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert [learning_rate_factor("linear", step, 0, 4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


def test_a_warmup_longer_than_the_run_only_rises() -> None:
    assert [learning_rate_factor("linear", step, 8, 4) for step in range(4)] == [1 / 8, 2 / 8, 3 / 8, 4 / 8]


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_all_begin_with_the_same_warmup(schedule: str) -> None:
    factors = [learning_rate_factor(schedule, step, 5, 20) for step in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_a_cosine_falls_by_half_a_wave() -> None:
    factors = [learning_rate_factor("cosine", step, 0, 12) for step in range(13)]
    assert factors == pytest.approx([(1 + math.cos(math.pi * step / 12)) / 2 for step in range(13)])
    assert [learning_rate_factor("constant", step, 0, 12) for step in range(13)] == [1] * 13


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(InputError, match="schedule must be one of linear, cosine, constant, but it is 'step'"):
        learning_rate_factor("step", 0, 0, 1)
