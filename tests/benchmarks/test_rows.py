"""Rows on disk: nothing is lost, and nothing that is wrong gets a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.measure import Ceilings, Timing
from benchmarks.rows import COMMIT_VARIABLE, Environment, ResultRow, RowWriter, newest, read_rows

MakeRow = Callable[..., ResultRow]


def test_round_trip(make_row: MakeRow, tmp_path: Path) -> None:
    written = [make_row(), make_row(None, status=rows.WRONG, error=0.5, detail="a, b"), make_row(metrics={"mfu": 0.5})]
    writer = RowWriter(tmp_path / "folder" / "rows.jsonl")
    for row in written:
        writer.write(row)
    assert read_rows(writer.path) == written
    assert read_rows(tmp_path) == written


def test_a_row_that_was_cut_off(make_row: MakeRow, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    RowWriter(path).write(make_row(1.0))
    RowWriter(path).write(make_row(2.0))
    path.write_bytes(path.read_bytes()[:-20])
    assert [row.p50_ms for row in read_rows(path)] == [1.0]
    RowWriter(path).write(make_row(3.0))
    assert [row.p50_ms for row in read_rows(path)] == [1.0, 3.0]


def test_a_damaged_row(make_row: MakeRow, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    RowWriter(path).write(make_row())
    path.write_text('{"kernel": "x"}\n' + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match="line 1, is not a row"):
        read_rows(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_rows(tmp_path / "other.jsonl")


@pytest.mark.parametrize("status", [rows.WRONG, rows.FAILED, rows.OUT_OF_MEMORY, rows.UNAVAILABLE])
def test_only_timed_statuses_have_times(make_row: MakeRow, status: str) -> None:
    with pytest.raises(ValueError, match="must not have a time"):
        make_row(2.0, status=status)
    with pytest.raises(ValueError, match="status must be one of"):
        make_row(status="fine")


def test_shares_of_the_ceilings() -> None:
    ceilings = Ceilings({"float32": 1000.0}, copy_bandwidth=100.0)
    timing = Timing((2000.0,), "")
    assert rows.rates(timing, 1000, 50, "float32", ceilings) == {"gemm_share": 0.5, "copy_share": 0.25}
    assert rows.rates(timing, 1000, 50, "bfloat16", ceilings) == {"gemm_share": None, "copy_share": 0.25}
    assert rows.rates(timing, None, None, "float32", None) == {"gemm_share": None, "copy_share": None}


def test_newest(make_row: MakeRow, where: Environment) -> None:
    other = replace(where, threads=2)
    chosen = newest([make_row(1.0), make_row(2.0, environment=other), make_row(3.0, provider="x"), make_row(4.0)])
    assert sorted(row.p50_ms or 0 for row in chosen) == [2.0, 3.0, 4.0]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, "abc")
    found = rows.environment(torch.device("cpu"))
    assert (found.kind, found.commit, found.torch) == ("cpu", "abc", torch.__version__)
    assert found.folder
    assert "/" not in found.folder


def test_collect(make_row: MakeRow, where: Environment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, results = tmp_path / "run" / "rows.jsonl", tmp_path / "results"
    for row in (make_row(1.0), make_row(2.0, environment=replace(where, device="NVIDIA H200"))):
        RowWriter(run).write(row)
    assert rows.main(["collect", str(run.parent), "--results", str(results)]) == 0
    RowWriter(run).write(make_row(3.0))
    assert rows.main(["collect", str(run), "--results", str(results)]) == 0
    assert [row.p50_ms for row in read_rows(results / "some-cpu" / "rows.jsonl")] == [1.0, 3.0]
    assert [row.p50_ms for row in read_rows(results / "nvidia-h200")] == [2.0]
    assert rows.main(["collect", str(tmp_path / "nothing"), "--results", str(results)]) == 2
    assert "does not exist" in capsys.readouterr().err
