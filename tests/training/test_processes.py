"""Several processes do what one does: two of them, connected by Gloo, started by torchrun once for all tests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from processes import losses_of, make_trainer

from gakernels import InputError
from gakernels.distributed import Ranks
from gakernels.training.checkpoint import find_checkpoints


@pytest.fixture(scope="module")
def run_seed() -> int:
    """Drawn once for all tests; the name of the folder has it too."""
    return int(os.environ.get("GAKERNELS_TEST_SEED") or torch.seed()) % 10**6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_seed: int) -> Path:
    return tmp_path_factory.mktemp(f"seed-{run_seed}-")


@pytest.fixture(scope="module")
def one(folder: Path, run_seed: int) -> dict[str, Any]:
    """What a single process gives; its checkpoint after step 3 is there for several."""
    found = {
        "float": losses_of(make_trainer(run_seed, folder / "one", keep_checkpoints=9).run()),
        "double": losses_of(make_trainer(run_seed, dtype=torch.float64).run()),
    }
    for name in ("one_to_replicas", "one_to_shards"):
        shutil.copytree(folder / "one", folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "step-00000006")
    return found


@pytest.fixture(scope="module")
def two(one: dict[str, Any], folder: Path, run_seed: int) -> list[dict[str, Any]]:
    """What each of two processes found."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, processes.__file__, str(folder), str(run_seed)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


def assert_close(
    found: list[list[float]], expected: list[list[float]], relative: float = 1e-6, of_norms: float = 1e-3
) -> None:
    """Losses of each step, and gradient norms, which in float32 feel more of the rounding of the steps before."""
    assert len(found) == len(expected)
    for (*row, norm), (*other, other_norm) in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=relative)
        assert norm == pytest.approx(other_norm, rel=of_norms)


@pytest.mark.parametrize("name", ["replicas", "replicas accumulating", "shards"])
def test_losses_and_gradients_are_those_of_one_process(
    one: dict[str, Any], two: list[dict[str, Any]], name: str
) -> None:
    for found in two:
        assert_close(found[name], one["float"])


@pytest.mark.parametrize("name", ["replicas double", "shards double"])
def test_they_differ_by_rounding_alone(one: dict[str, Any], two: list[dict[str, Any]], name: str) -> None:
    for found in two:
        assert_close(found[name], one["double"], 1e-10, 1e-10)


@pytest.mark.parametrize(
    "name", ["replicas from one", "shards from one", "shards from replicas", "replicas from shards", "resumed"]
)
def test_a_checkpoint_is_gone_on_with_in_another_way(one: dict[str, Any], two: list[dict[str, Any]], name: str) -> None:
    for found in two:
        assert_close(found[name], one["float"][3:])


@pytest.mark.parametrize("name", ["replicas", "shards"])
def test_one_process_goes_on_with_the_checkpoint_of_two(
    one: dict[str, Any], two: list[dict[str, Any]], folder: Path, run_seed: int, tmp_path: Path, name: str
) -> None:
    shutil.copytree(folder / name, tmp_path / name)
    _, last = find_checkpoints(tmp_path / name / "checkpoints")
    parts = {f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)}
    assert {path.name for path in last.glob("*.safetensors")} == parts  # each wrote its own
    shutil.rmtree(last)
    assert_close(losses_of(make_trainer(run_seed, tmp_path / name).run()), one["float"][3:])


def test_a_signal_to_one_process_stops_all_after_the_same_step(two: list[dict[str, Any]]) -> None:
    for found in two:
        code, message = found["stopped"]
        assert code == 143
        assert "stopped by SIGTERM after step 3" in message


def test_a_bad_loss_of_one_process_is_skipped_by_all(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["skipped"] == [[2], True]


def test_a_parameter_that_a_process_did_not_use_counts_as_zero_there(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["unused"] == [[1.0] * 3, [5.0] * 3, [5.0] * 3, [0.0] * 3]


def test_parameters_from_before_the_model_was_sharded_are_refused(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert "parameters must be those of the model after it was sharded, but model/layers/0" in found["stale"]


def test_the_log_is_written_once(two: list[dict[str, Any]], folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "replicas" / "log.jsonl").read_text().splitlines()]
    assert losses_of(lines) == two[0]["replicas"]


@pytest.mark.parametrize(
    ("rank", "world", "local", "message"),
    [
        (None, "2", "0", "RANK=None, WORLD_SIZE=2, LOCAL_RANK=0"),
        ("one", "2", "0", "RANK=one"),
        ("2", "2", "0", "RANK must be below WORLD_SIZE, but they are 2 and 2"),
    ],
)
def test_an_environment_that_makes_no_sense_is_told(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, world: str, local: str, message: str
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", local)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        Ranks.from_environment()


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(0, 1, 0)
