"""The tables of launch settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gakernels import FormatError, InputError
from gakernels.ops import tuned
from gakernels.ops.dispatch import OPERATIONS

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
    with pytest.raises(FormatError, match="is not a table of launch settings"):
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
        assert name.split(".")[0] in OPERATIONS
        assert not entries[-1].get("sizes"), f"the last entry of {name} must fit all sizes"
