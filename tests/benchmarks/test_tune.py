"""The search for launch settings, with a made-up clock."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from benchmarks.tune import Settings, SettingsRequest
from gakernels.ops import tuned

START = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 2}
REQUEST = SettingsRequest("some.kernel", "float32", (("state", 64),), tuple(START.items()))


def test_it_finds_the_fastest_and_passes_over_what_can_not_be_used() -> None:
    asked: list[Settings] = []

    def seconds(settings: Settings) -> float | None:
        asked.append(settings)
        if settings["num_warps"] == 8:
            return None
        return 1.0 + abs(settings["BLOCK_M"] - 256) / 64 + abs(settings["num_stages"] - 4) / 8

    found = tune.tune("some.kernel", START, seconds)
    assert found == {"BLOCK_M": 256, "num_warps": 4, "num_stages": 4}
    assert len({json.dumps(settings, sort_keys=True) for settings in asked}) == len(asked)


def test_it_stays_where_nothing_is_clearly_faster() -> None:
    found = tune.tune("some.kernel", START, lambda settings: 1.0 if settings == START else 0.99)
    assert found == START


def test_neighbours_stay_within_bounds() -> None:
    for settings in tune.neighbours({"BLOCK_M": 16, "num_warps": 1, "num_stages": 1, "GROUP_M": 1}):
        assert settings["BLOCK_M"] >= 16
        assert min(settings.values()) >= 1


def test_launches_and_settings_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"kernels": {"some.kernel": [{"dtypes": ["float32"], "settings": START}]}}))
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(own))

    def run() -> Settings:
        return tuned.settings("some.kernel", torch.device("cpu"), torch.float32, state=64)

    assert tune.asked(run) == [REQUEST]
    with tune.in_force(REQUEST, {"BLOCK_M": 128}, own):
        assert run() == {"BLOCK_M": 128}
        assert tuned.settings("some.kernel", torch.device("cpu"), torch.float32, state=32) == START
    assert run() == START


def test_storing_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "some-gpu.json"
    other = SettingsRequest("other.kernel", "bfloat16", (), ())
    tune.store(path, "Some GPU", REQUEST, {"BLOCK_M": 32})
    tune.store(path, "Some GPU", other, {"BLOCK_M": 16})
    tune.store(path, "Some GPU", REQUEST, {"BLOCK_M": 64})
    kernels = json.loads(path.read_text())["kernels"]
    assert kernels["some.kernel"] == [{"dtypes": ["float32"], "sizes": {"state": 64}, "settings": {"BLOCK_M": 64}}]
    assert [entry["settings"] for entry in kernels["other.kernel"]] == [{"BLOCK_M": 16}]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--preset", "tiny"]) == 2
    assert "tuning needs a GPU" in capsys.readouterr().err
