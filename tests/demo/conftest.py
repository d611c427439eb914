"""Fresh random numbers for each test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed(generator: torch.Generator) -> None:
    """Random models and inputs are drawn from the global generator; it starts with the seed of this test."""
    torch.manual_seed(generator.initial_seed())
