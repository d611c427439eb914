"""The tables of launch settings and of measured defaults, and the rule that reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gakernels import FormatError, InputError
from gakernels.ops import dispatch, measured, tuned

CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own table of launch settings, in force."""
    path = tmp_path / "table.json"
    monkeypatch.setenv("GAKERNELS_TUNED", str(path))
    tuned._entries.cache_clear()
    return path


def write(path: Path, **kernels: Any) -> None:
    path.write_text(json.dumps({"kernels": kernels}))
    tuned._entries.cache_clear()


def test_the_first_entry_that_fits(table: Path) -> None:
    special = {"dtypes": ["bfloat16"], "sizes": {"hidden": 64}, "settings": {"BLOCK_M": 32}}
    general = {"dtypes": ["bfloat16", "float32"], "settings": {"BLOCK_M": 64}}
    write(table, some_kernel=[special, general])
    assert tuned.settings("some_kernel", CPU, torch.bfloat16, hidden=64) == {"BLOCK_M": 32}
    assert tuned.settings("some_kernel", CPU, torch.bfloat16, hidden=65) == {"BLOCK_M": 64}
    assert tuned.settings("some_kernel", CPU, torch.bfloat16) == {"BLOCK_M": 64}
    assert tuned.settings("some_kernel", CPU, torch.float32, hidden=64) == {"BLOCK_M": 64}
    with pytest.raises(LookupError, match="no settings of some_kernel for float16"):
        tuned.settings("some_kernel", CPU, torch.float16)


def test_what_is_given_out_can_be_changed(table: Path) -> None:
    write(table, some_kernel=[{"dtypes": ["float32"], "settings": {"BLOCK_M": 64}}])
    tuned.settings("some_kernel", CPU, torch.float32)["BLOCK_M"] = 1
    assert tuned.settings("some_kernel", CPU, torch.float32) == {"BLOCK_M": 64}


def test_an_own_table_that_is_not_there(table: Path) -> None:
    with pytest.raises(InputError, match="GAKERNELS_TUNED must name a file"):
        tuned.settings("some_kernel", CPU, torch.float32)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kernels": []}',
        '{"kernels": {"k": [{}]}}',
        '{"kernels": {"k": [{"dtypes": "float32"}]}}',
        '{"kernels": {"k": [{"dtypes": ["float32"], "settings": {"BLOCK_M": 1.5}}]}}',
    ],
)
def test_a_damaged_table(table: Path, text: str) -> None:
    table.write_text(text)
    with pytest.raises(FormatError, match="is no table of launch settings"):
        tuned.settings("k", CPU, torch.float32)


def test_the_shipped_tables_are_well_formed() -> None:
    for path in tuned.FOLDER.glob("*.json"):
        for entries in tuned._entries(path).values():
            for entry in entries:
                settings = entry["settings"]
                assert settings["num_warps"] in (1, 2, 4, 8, 16)
                powers = {name: value for name, value in settings.items() if name.startswith("BLOCK")}
                assert all(value >= 1 and value & (value - 1) == 0 for value in powers.values())
    kernels = tuned._entries(tuned.DEFAULT)
    for name, entries in kernels.items():
        assert name.split(".")[0] in ("context_state", "low_rank_polar", "lowrank_linear")
        assert not entries[-1].get("sizes"), f"the last entry of {name} must fit all sizes"


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of measured rules, with one for an invented GPU."""
    rule = {"operation": "low_rank_polar", "dtype": "float32", "backend": "cuda", "commit": "abc"}
    rule["sizes"] = {"batch": 8, "state": 64, "rank": 16, "power_iterations": 1}
    (tmp_path / "some-gpu-9.json").write_text(json.dumps({"gpu": "Some GPU 9", "rules": [rule]}))
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    measured._read.cache_clear()
    yield tmp_path
    measured._read.cache_clear()


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({}, "cuda"),
        ({"batch": 9}, "cuda"),  # more of the same keeps the GPU as busy
        ({"batch": 7}, None),
        ({"state": 65}, None),
        ({"rank": 8}, None),
        ({"power_iterations": 2}, None),
        ({"more": 1}, None),
    ],
)
def test_a_rule_fits_the_sizes_it_was_measured_for(rules: Path, change: dict[str, int], backend: str | None) -> None:
    sizes = {"batch": 8, "state": 64, "rank": 16, "power_iterations": 1, **change}
    assert measured.fastest("Some GPU 9", "low_rank_polar", torch.float32, sizes) == backend
    assert measured.fastest("Some GPU 9", "low_rank_polar", torch.float64, sizes) is None
    assert measured.fastest("Some GPU 9", "context_state", torch.float32, sizes) is None
    assert measured.fastest("Some GPU 8", "low_rank_polar", torch.float32, sizes) is None


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")


def test_the_default_on_a_gpu(rules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GAKERNELS_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU 9")
    states = torch.ones(8, 64, 64).as_subclass(OnGpu)
    monkeypatch.setattr(dispatch, "why_not", lambda *arguments: None)
    choice = dispatch.choose("low_rank_polar", states, torch.ones(64, 16), 1, 1e-3)
    assert (choice.backend, choice.reason) == ("cuda", "measured faster on Some GPU 9")
    choice = dispatch.choose("low_rank_polar", states, torch.ones(64, 17), 1, 1e-3)
    assert choice.backend == "eager"
    assert "no committed measurement" in choice.reason
    monkeypatch.setattr(dispatch, "why_not", lambda *arguments: "it is not built")
    choice = dispatch.choose("low_rank_polar", states, torch.ones(64, 16), 1, 1e-3)
    assert choice.backend == "eager"
    assert "it is not built" in choice.reason


def test_the_default_on_a_gpu_under_compile(rules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule reads files and asks the driver; torch.compile must take its result for a constant."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU 9")
    monkeypatch.setattr(dispatch, "missing", torch.compiler.assume_constant_result(lambda *names: None))

    def function(states: torch.Tensor, sketch: torch.Tensor) -> torch.Tensor:
        choice = dispatch._default_on_gpu("low_rank_polar", (states, sketch, 1, 1e-3), 0)
        return states + 1 if choice.backend == "cuda" else states - 1

    monkeypatch.setattr(dispatch, "why_not", lambda *arguments: None)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(8, 64, 64), torch.zeros(64, 16)).mean() == 1
    assert compiled(torch.zeros(8, 64, 64), torch.zeros(64, 17)).mean() == -1
    dynamic = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, sign in ((9, 1), (12, 1), (3, -1)):
        assert dynamic(torch.zeros(batch, 64, 64), torch.zeros(64, 16)).mean() == sign
