"""A run that is killed at random moments and started again gives what an undisturbed run gives."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import killed
import pytest
import torch
from regression import drawn_seed, log_of
from safetensors.torch import load_file
from torch import Tensor

Train = Callable[[Path, int], None]


def last_numbers(folder: Path) -> dict[str, Tensor]:
    """The tensors of the last checkpoint: the parameters and the optimizer."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {name: tensor for path in newest.glob("*.safetensors") for name, tensor in load_file(path).items()}


def compare(tmp_path: Path, train: Train, seed: int, kills: list[killed.Kill], least: int) -> None:
    assert killed.run(train, tmp_path / "whole", seed) == 0
    codes = [killed.run(train, tmp_path / "parts", seed, kill) for kill in kills]
    assert codes.count(-9) >= least, "the run ended before it was killed"
    assert killed.run(train, tmp_path / "parts", seed) == 0
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    found, wanted = last_numbers(tmp_path / "parts"), last_numbers(tmp_path / "whole")
    assert wanted
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)  # losses not yet seen are NaN
    assert not list((tmp_path / "parts" / "checkpoints").glob("*.damaged"))  # half a checkpoint never had its name


def test_three_times(tmp_path: Path) -> None:
    seed = drawn_seed()
    random = Random(seed)
    kills = [killed.while_writing(random), killed.after(random, 0.2), killed.while_writing(random)]
    compare(tmp_path, killed.train_regression, seed, kills, least=2)


@pytest.mark.slow
@pytest.mark.parametrize("train", [killed.train_longer, killed.train_generator])
def test_ten_times(tmp_path: Path, train: Train) -> None:
    seed = drawn_seed()
    random = Random(seed)
    kills = [killed.while_writing(random) if number % 2 else killed.after(random, 0.5) for number in range(10)]
    compare(tmp_path, train, seed, kills, least=10)
