"""The stages without times: what is compiled ahead is each kind of launch once, and just what a later launch asks for;
the program that compute-sanitizer watches runs every kernel there is.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_resources, worker
from benchmarks.operations import operations
from benchmarks.rows import ROOT
from gakernels.ops.dispatch import OPERATIONS

pytest.importorskip("triton")
META = torch.device("meta")


class Kernel:
    """As much of a kernel as a launch is told apart by."""

    def fn(self) -> None: ...


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((3, True), (5, True), True),
        ((32, None), (48, None), True),
        ((32, None), (33, None), False),
        ((1,), (3,), False),
        ((2**31 + 1,), (3,), False),
        ((True,), (1,), False),
        ((torch.empty(2),), (torch.empty(3, 4),), True),
        ((torch.empty(2),), (torch.empty(2, dtype=torch.bfloat16),), False),
    ],
)
def test_launches_are_told_apart_by_what_triton_specialises(one: tuple, other: tuple, same: bool) -> None:
    kernel, options = Kernel(), {"BLOCK": 16}
    keys = [kernel_resources.Launch(kernel, arguments, options).key for arguments in (one, other)]
    assert (keys[0] == keys[1]) == same
    assert keys[0] != kernel_resources.Launch(kernel, one, {"BLOCK": 32}).key


def test_every_operation_launches_something_forward_and_backward() -> None:
    for name in OPERATIONS:
        runs = kernel_resources.preset_runs(["tiny"], [name], torch.bfloat16)
        found = kernel_resources.launches(runs)
        assert len(found) >= 2, name
        assert len(kernel_resources.launches([*runs, *runs])) == len(found)


def test_tensors_without_data_get_the_settings_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    plain = kernel_resources.tuned.settings

    def settings(kernel: str, device: torch.device, dtype: torch.dtype, **sizes: int) -> dict[str, int]:
        asked.append(device)
        return plain(kernel, META, dtype, **sizes)

    monkeypatch.setattr(kernel_resources.tuned, "settings", settings)
    operation = next(iter(operations("tiny", META, torch.bfloat16)))
    with kernel_resources.settings_of(torch.device("cuda")):
        kernel_resources.launches([kernel_resources.passes_of(operation)])
    assert set(asked) == {torch.device("cuda")}


@pytest.mark.slow
def test_the_second_time_everything_is_in_the_cache(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.worker", "compile", "--out", str(tmp_path / "out"), "--rehearse"]

    def compiled() -> set[Path]:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        count = len(list(tmp_path.rglob("*.cubin")))
        assert f"compiled {count} of {count} launches" in done.stdout
        return set(tmp_path.rglob("*"))

    assert compiled() == compiled()


@pytest.mark.kernels
def test_every_operation_has_a_kernel_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [] if torch.cuda.is_available() else ["--rehearse"]
    assert worker.main(["kernels_once", "--out", str(tmp_path), *words]) == 0
    done = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("triton: done")}
    assert done == set(OPERATIONS)
