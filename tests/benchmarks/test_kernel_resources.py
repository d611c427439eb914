"""All kernels compile for a Hopper GPU within its limits, with each version of Triton, as the committed table says.

Compiling needs a process without TRITON_INTERPRET; each version of Triton gets one.
"""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_resources
from benchmarks.kernel_resources import STORE, Resources, to_csv
from benchmarks.rows import ROOT
from gakernels.ops import gpus
from gakernels.ops.dispatch import OPERATIONS

OLDEST = "GAKERNELS_OLDEST_TRITON"  # a folder with the oldest version that is supported
VERSIONS = ("development", "oldest")
# Kernels that only move, compare or add numbers, so that there is nothing for the matrix units.
NO_PRODUCTS = {
    "context_state.clear_left_out",
    "context_state.suffix_gradients",
    "gated_product.gradients",
    "gated_product.product",
    "low_rank_polar.largest_entries",
}
ODD = "4095 -> 4093"  # rows that start at odd places can't be copied asynchronously; the operation's page says so


def read_csv(path: Path) -> list[Resources]:
    """The rows of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Resources(**{name: _read(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]


def _read(name: str, text: str) -> Any:
    if name == "settings":
        return dict(entry.split("=") for entry in text.split())
    return text.split("; ") if name == "cases" else text if name in ("operation", "kernel", "dtypes") else int(text)


def compiled(tmp_path: Path, folder: str | None, *options: str) -> Path:
    """The table that the command stores, with another version of Triton where a folder is given."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, str(ROOT), environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--store", str(tmp_path), *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (table,) = tmp_path.glob("*.csv")
    return table


def folder_of(version: str) -> str | None:
    """Where another version of Triton is than the installed one."""
    pytest.importorskip("triton")
    if version == "development":
        return None
    folder = os.environ.get(OLDEST)
    return folder or pytest.skip(f"{OLDEST} names no folder with Triton 3.6.0 (`make test` makes one)")


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_every_kernel_fits_a_hopper_gpu_and_the_table_is_true(tmp_path: Path, version: str) -> None:
    table = compiled(tmp_path, folder_of(version))
    rows = read_csv(table)
    assert {row.operation for row in rows} == set(OPERATIONS)
    for row in rows:
        name = f"{row.operation}.{row.kernel}"
        assert not row.faults, (name, row.settings, row.faults)
        if name in NO_PRODUCTS:
            assert row.wgmma == row.mma == 0, name
        else:
            check_matrix_kernel(row)
    stored = STORE / table.name
    if version == "oldest" or stored.exists():
        assert stored.read_text(encoding="utf-8") == table.read_text(encoding="utf-8"), "run it with --store"


@pytest.mark.parametrize(
    ("operation", "case", "kernels", "version"),
    [
        ("context_state", "hidden 4096, state 1024, bf16, masked", 5, "oldest"),
        ("low_rank_polar", "state 512, rank 64, 8", 13, "development"),
        ("lowrank_linear", "4096 -> 4096, rank 128, bf16, indexed", 6, "oldest"),
        ("gated_product", "width 14336, bf16", 2, "development"),
    ],
)
def test_some_kernels_are_those_of_the_table(
    tmp_path: Path, operation: str, case: str, kernels: int, version: str
) -> None:
    """A part of the test above that takes seconds."""
    table = compiled(tmp_path, folder_of(version), "--operations", operation, "--only", case)
    rows = read_csv(table)
    assert len(rows) == kernels
    assert not any(row.faults for row in rows)
    stored = STORE / table.name
    if not stored.exists():
        assert version == "development"
        pytest.skip("there is no table for this version of Triton")
    known = [replace(row, cases=[case]) for row in read_csv(stored) if case in row.cases]
    assert sorted(map(repr, rows)) == sorted(map(repr, known))


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in kernel_resources.TARGETS if target != kernel_resources.HOPPER])
def test_the_largest_kernels_fit_other_gpus(tmp_path: Path, target: int) -> None:
    """`python -m benchmarks.kernel_resources --target 89` compiles all cases, in a quarter of an hour."""
    pytest.importorskip("triton")
    cases = ("--operations", "lowrank_linear", "--only", "4096 -> 4096, rank 128, bf16")
    table = compiled(tmp_path, None, "--target", str(target), *cases)
    assert table.name.startswith(f"sm_{target}-triton-")
    rows = read_csv(table)
    assert {row.kernel for row in rows} == {"shrink", "linear", "factor_gradient"}
    assert all(kernel_resources.excess(row, target) == [] for row in rows)
    limit = gpus.known(kernel_resources.TARGETS[target]).shared_memory
    assert max(row.shared for row in rows) > 0.5 * limit  # the settings make use of it


def check_matrix_kernel(row: Resources) -> None:
    what = (row.operation, row.kernel, row.dtypes, row.settings)
    precision = row.settings.get("PRECISION", "tf32x3")  # low_rank_polar knows no other
    if "float64" in row.dtypes:
        assert row.mma > 0, what
    elif "float16" in row.dtypes or precision != "ieee":  # bfloat16 is in it
        assert row.wgmma > 0, what
    else:  # float32 without TF32 is no work for matrix units
        assert row.wgmma == row.mma == 0, what
    if not all(case.startswith(ODD) for case in row.cases):
        assert row.async_copies > 0, what
        # With two stages the only block under way is waited for, then the next one is copied during the product.
        assert row.in_flight > 0 or row.settings["num_stages"] == "2", what


def test_a_table_is_read_as_it_was_written() -> None:
    tables = list(STORE.glob("*.csv"))
    assert tables
    for table in tables:
        assert to_csv(read_csv(table)) == table.read_text(encoding="utf-8")


def test_the_kept_tables_have_all_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel_resources, "missing", lambda *_: None)
    for words in (["--only", "rank 8"], ["--operations", "context_state"], ["--target", "89"]):
        with pytest.raises(SystemExit):
            kernel_resources.main(["--store", *words])
        assert "leave out --operations, --only and --target" in capsys.readouterr().err


def test_faults() -> None:
    plain = Resources("o", "k", "float32", {}, ["c"], 128, 1000, 0, 0, 2, 1, 0, 1, 1)
    assert plain.faults == []
    values = vars(plain)
    assert "spill" in Resources(**{**values, "spills": 3}).faults[0]
    assert "stack" in Resources(**{**values, "stack": 8}).faults[0]
    assert "shared" in Resources(**{**values, "shared": 232_449}).faults[0]
    assert "registers" in Resources(**{**values, "programs_per_sm": 0}).faults[0]


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "programs"),
    [(255, 0, 256, 1), (128, 0, 128, 4), (32, 0, 128, 16), (16, 100_000, 128, 2), (24, 232_448, 128, 1)],
)
def test_programs_per_sm(registers: int, shared: int, threads: int, programs: int) -> None:
    assert kernel_resources._programs_per_sm(registers, shared, threads) == programs
