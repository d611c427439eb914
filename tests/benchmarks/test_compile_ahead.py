"""What is compiled ahead: each kind of launch once, and just what a later launch asks for."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compile_ahead
from benchmarks.rows import ROOT

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
    keys = [compile_ahead.Launch(kernel, arguments, options).key for arguments in (one, other)]
    assert (keys[0] == keys[1]) == same
    assert keys[0] != compile_ahead.Launch(kernel, one, {"BLOCK": 32}).key


def test_every_operation_launches_something_forward_and_backward() -> None:
    for name in compile_ahead.OPERATIONS:
        runs = compile_ahead.preset_runs(["tiny"], [name], torch.bfloat16)
        found = compile_ahead.launches(runs)
        assert len(found) >= 4, name
        assert len(compile_ahead.launches([*runs, *runs])) == len(found)


def test_tensors_without_data_get_the_settings_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    plain = compile_ahead.tuned.settings

    def settings(kernel: str, device: torch.device, dtype: torch.dtype, **sizes: int) -> dict[str, int]:
        asked.append(device)
        return plain(kernel, META, dtype, **sizes)

    monkeypatch.setattr(compile_ahead.tuned, "settings", settings)
    operation = next(iter(compile_ahead.operations("tiny", META, torch.bfloat16)))
    with compile_ahead.settings_of(torch.device("cuda")):
        compile_ahead.launches([functools.partial(compile_ahead.both_passes, operation)])
    assert set(asked) == {torch.device("cuda")}


@pytest.mark.slow
def test_the_second_time_everything_is_in_the_cache(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_ahead", "--presets", "tiny", "--operations", "context_state"]

    def compiled() -> set[Path]:
        done = subprocess.run(
            [*command, "--processes", "2"],
            cwd=ROOT,
            env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        count = len(list(tmp_path.rglob("*.cubin")))
        assert f"compiled {count} of {count} launches" in done.stdout
        return set(tmp_path.rglob("*"))

    assert compiled() == compiled()
