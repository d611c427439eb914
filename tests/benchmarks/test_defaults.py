"""Which rows make a kernel the default."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import defaults
from benchmarks.rows import WRONG, Row, RowWriter

MakeRow = Callable[..., Row]
SHAPE = "T=8 d_r=1024 r=128"
Times = tuple[float, float, float]


def rows(
    make_row: MakeRow, times: dict[str, Times], status: str = "ok", commit: str = "c1", gpu: str = "gpu"
) -> list[Row]:
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


def test_a_faster_kernel(make_row: MakeRow) -> None:
    found = defaults.rules(rows(make_row, {**EAGER, "triton": (4.0, 5.0, 6.0), "cuda": (3.0, 4.0, 5.0)}))
    (rule,) = found["NVIDIA H200"]
    assert rule["backend"] == "cuda"
    assert rule["sizes"] == {"batch": 8, "state": 1024, "rank": 128, "power_iterations": 1}
    assert (rule["operation"], rule["dtype"], rule["commit"]) == ("low_rank_polar", "float32", "c1")


@pytest.mark.parametrize("times", [(8.0, 8.5, 9.5), (11.0, 12.0, 13.0)])
def test_not_clearly_faster(make_row: MakeRow, times: Times) -> None:
    assert defaults.rules(rows(make_row, {**EAGER, "triton": times})) == {}


def test_wrong_half_measured_or_on_a_cpu(make_row: MakeRow) -> None:
    fast = {**EAGER, "triton": (1.0, 1.0, 1.0)}
    assert defaults.rules(rows(make_row, fast, status=WRONG)) == {}
    assert defaults.rules([row for row in rows(make_row, fast) if row.mode == "forward"]) == {}
    assert defaults.rules(rows(make_row, fast, gpu="cpu")) == {}
    assert defaults.rules(rows(make_row, {"triton": (1.0, 1.0, 1.0)})) == {}


def test_a_kernel_and_the_eager_form_of_other_commits_are_not_compared(make_row: MakeRow) -> None:
    other = rows(make_row, {"triton": (1.0, 1.0, 1.0)}, commit="c2")
    assert defaults.rules([*rows(make_row, EAGER), *other]) == {}


def test_later_rows_of_a_case_stand_for_earlier_ones(make_row: MakeRow) -> None:
    first = rows(make_row, {**EAGER, "triton": (1.0, 1.0, 1.0)}, commit="c1")
    later = rows(make_row, {**EAGER, "cuda": (1.0, 1.0, 1.0)}, commit="c2")
    (rule,) = defaults.rules([*first, *later])["NVIDIA H200"]
    assert (rule["backend"], rule["commit"]) == ("cuda", "c2")


def test_the_command(make_row: MakeRow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = RowWriter(tmp_path / "rows.jsonl")
    for row in rows(make_row, {**EAGER, "triton": (1.0, 1.0, 1.0)}):
        writer.write(row)
    assert defaults.main([str(writer.path), "--folder", str(tmp_path / "measured")]) == 0
    document = json.loads((tmp_path / "measured" / "nvidia-h200.json").read_text())
    assert document["gpu"] == "NVIDIA H200"
    assert [rule["backend"] for rule in document["rules"]] == ["triton"]
    assert defaults.main([str(tmp_path / "none.jsonl")]) == 2
    assert "there are no results at" in capsys.readouterr().err
