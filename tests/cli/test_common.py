"""The device of a process among several."""

import pytest

from gakernels import InputError
from gakernels.cli import common


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, local_rank: int) -> list[str]:
    """Stand in for torchrun and for a machine with GPUs; the devices that are looked at."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, str(value))
    looked_at: list[str] = []
    monkeypatch.setattr(common, "check_device", looked_at.append)
    return looked_at


def test_a_process_looks_at_no_gpu_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = as_process(monkeypatch, rank=11, world=16, local_rank=3)
    assert common.process_device("cuda") == "cuda:3"
    assert looked_at == ["cuda:3"]


@pytest.mark.parametrize("device", ["cpu", "cuda:5"])
def test_a_device_that_is_named_whole_stays(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    looked_at = as_process(monkeypatch, rank=1, world=2, local_rank=1)
    assert common.process_device(device) == device
    assert looked_at == [device]


def test_an_environment_that_is_not_torchruns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    as_process(monkeypatch, rank=1, world=2, local_rank=1)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(InputError, match="must be the numbers that torchrun sets"):
        common.process_device("cuda")
