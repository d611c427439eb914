"""What result rows say about the backends on a GPU."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.rows import RESULTS, WRONG, ResultRow, RowWriter, documents, main
from gakernels.ops import measured

MakeRow = Callable[..., ResultRow]
SHAPE = "T=8 d_r=1024 r=128"
Times = tuple[float, float, float]


def rows(
    make_row: MakeRow, times: dict[str, Times], status: str = "ok", commit: str = "c1", gpu: str = "gpu"
) -> list[ResultRow]:
    found = []
    for provider, (p20, p50, p80) in times.items():
        for mode in ("forward", "backward"):
            plain = make_row(p50)
            environment = replace(plain.environment, device="NVIDIA H200", kind=gpu, commit=commit)
            row = replace(plain, kernel="low_rank_polar", provider=provider, mode=mode, shape=SHAPE, dtype="float32")
            row = replace(row, environment=environment, p20_ms=p20, p50_ms=p50, p80_ms=p80)
            if provider != "eager" and mode == "backward" and status != "ok":
                row = replace(row, status=status, p20_ms=None, p50_ms=None, p80_ms=None)
            found.append(row)
    return found


EAGER = {"eager": (9.0, 10.0, 11.0)}
BOTH = {**EAGER, "triton": (4.0, 5.0, 6.0)}


def ceilings(make_row: MakeRow) -> list[ResultRow]:
    """What the suite's stage `device` leaves."""
    plain = make_row(1.0)
    environment = replace(plain.environment, device="NVIDIA H200", kind="gpu")
    row = replace(plain, kernel="ceiling", provider="torch", shape="", environment=environment)
    return [
        replace(row, mode="gemm", dtype="bfloat16", metrics={"flops_per_s": 7e14}),
        replace(row, mode="copy", dtype="float32", metrics={"bytes_per_s": 4e12}),
    ]


def test_a_case_with_several_backends(make_row: MakeRow) -> None:
    found = documents([*ceilings(make_row), *rows(make_row, {**BOTH, "cuda": (3.0, 4.0, 5.0)})])
    document = found["NVIDIA H200"]
    assert (document["capability"], document["gemm_flops"], document["copy_bytes"]) == (
        [9, 0],
        {"bfloat16": 7e14},
        4e12,
    )
    assert document["rows"] == [
        {
            "operation": "low_rank_polar",
            "dtype": "float32",
            "sizes": {"batch": 8, "state": 1024, "rank": 128, "power_iterations": 1},
            "milliseconds": {"eager": [10.0, 10.0], "triton": [5.0, 5.0], "cuda": [4.0, 4.0]},
            "commit": "c1",
        }
    ]


def test_wrong_half_measured_alone_or_on_a_cpu(make_row: MakeRow) -> None:
    def found(*more: ResultRow) -> dict[str, object]:
        return documents([*ceilings(make_row), *more])

    assert found(*rows(make_row, BOTH, status=WRONG)) == {}
    assert found(*(row for row in rows(make_row, BOTH) if row.mode == "forward")) == {}
    assert found(*rows(make_row, BOTH, gpu="cpu")) == {}
    assert found(*rows(make_row, {"triton": (1.0, 1.0, 1.0)})) == {}
    assert documents(rows(make_row, BOTH)) == {}  # no rates of the GPU


def test_backends_of_different_commits_are_not_compared(make_row: MakeRow) -> None:
    other = rows(make_row, {"triton": (1.0, 1.0, 1.0)}, commit="c2")
    assert documents([*ceilings(make_row), *rows(make_row, EAGER), *other]) == {}


def test_later_rows_of_a_case_stand_for_earlier_ones(make_row: MakeRow) -> None:
    later = rows(make_row, {**EAGER, "cuda": (1.0, 1.0, 1.0)}, commit="c2")
    (row,) = documents([*ceilings(make_row), *rows(make_row, BOTH), *later])["NVIDIA H200"]["rows"]
    assert (list(row["milliseconds"]), row["commit"]) == (["eager", "cuda"], "c2")


def test_the_command(make_row: MakeRow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = RowWriter(tmp_path / "rows.jsonl")
    for row in [*ceilings(make_row), *rows(make_row, BOTH)]:
        writer.write(row)
    assert main(["defaults", str(writer.path), "--folder", str(tmp_path / "measured")]) == 0
    document = json.loads((tmp_path / "measured" / "nvidia-h200.json").read_text())
    assert document["gpu"] == "NVIDIA H200"
    assert len(document["rows"]) == 1
    assert main(["defaults", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl does not exist" in capsys.readouterr().err


def test_a_gpu_of_unknown_capability_is_a_mistake(
    make_row: MakeRow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = RowWriter(tmp_path / "rows.jsonl")
    for row in rows(make_row, BOTH):
        writer.write(replace(row, environment=replace(row.environment, device="Voodoo")))
    assert main(["defaults", str(writer.path), "--folder", str(tmp_path)]) == 2
    assert "but it is 'Voodoo'" in capsys.readouterr().err


def test_the_committed_measurements_are_those_of_the_committed_rows(tmp_path: Path) -> None:
    for path in measured.FOLDER.glob("*.json"):
        assert main(["defaults", str(RESULTS / path.stem / "rows.jsonl"), "--folder", str(tmp_path)]) == 0
        assert (tmp_path / path.name).read_text() == path.read_text()
