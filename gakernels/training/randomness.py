"""Python's, NumPy's and PyTorch's global random numbers: a step begins with those of its number."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Whatever a step draws from the global generators follows from these three numbers alone."""
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@contextmanager
def random_kept(device: torch.device) -> Iterator[None]:
    """The global generators are after the block as they were before it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
