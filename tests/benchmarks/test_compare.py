"""Ratios of two sets of rows, with their spread."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import rows
from benchmarks.rows import Environment, Ratio, ResultRow, RowWriter

MakeRow = Callable[..., ResultRow]


def write(path: Path, *written: ResultRow) -> str:
    writer = RowWriter(path)
    for row in written:
        writer.write(row)
    return str(path)


def test_ratio_and_spread(make_row: MakeRow) -> None:
    a, b = make_row(p20_ms=1.0, p50_ms=2.0, p80_ms=4.0), make_row(p20_ms=3.0, p50_ms=5.0, p80_ms=6.0)
    assert rows.ratio(a, b) == Ratio(2.5, 0.75, 6.0)
    with pytest.raises(ValueError, match="without a time"):
        rows.ratio(a, make_row(None, status="wrong"))


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio(1.3, 1.2, 1.4), "slower"),
        (Ratio(1.3, 0.9, 1.6), ""),  # the spreads overlap
        (Ratio(1.05, 1.01, 1.1), ""),  # below the limit
        (Ratio(0.7, 0.6, 0.8), "faster"),
        (Ratio(0.7, 0.5, 1.1), ""),
    ],
)
def test_verdict(ratio: Ratio, verdict: str) -> None:
    assert ratio.verdict(1.1) == verdict


def test_two_files(make_row: MakeRow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.jsonl", make_row(9.0), make_row(2.0), make_row(1.0, provider="x"))
    same = write(tmp_path / "b.jsonl", make_row(2.02), make_row(1.0, provider="y"))
    slow = write(tmp_path / "c.jsonl", make_row(3.0))
    assert rows.main(["compare", a, same]) == 0
    output = capsys.readouterr().out
    assert "1.010" in output
    assert "1 in both, 2 in one only, 0 worse" in output
    assert rows.main(["compare", a, slow]) == 1
    assert "1.500  1.36..1.66 slower" in capsys.readouterr().out
    assert rows.main(["compare", a, slow, "--limit", "2"]) == 0
    assert rows.main(["compare", slow, a]) == 0
    assert "faster" in capsys.readouterr().out


def test_ceilings_have_no_times_to_compare(
    make_row: MakeRow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ceiling = make_row(None, kernel="ceiling", metrics={"flops_per_s": 1e12})
    a = write(tmp_path / "a.jsonl", make_row(), ceiling)
    assert rows.main(["compare", a, a]) == 0
    assert "ceiling" not in capsys.readouterr().out


def test_a_case_that_became_wrong(make_row: MakeRow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.jsonl", make_row())
    b = write(tmp_path / "b.jsonl", make_row(None, status="wrong", detail="0.5 from the oracle"))
    assert rows.main(["compare", a, b]) == 1
    assert "wrong  0.5 from the oracle" in capsys.readouterr().out
    assert rows.main(["compare", b, a]) == 0


def test_two_commits(make_row: MakeRow, where: Environment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results" / "some-cpu"
    for commit, median in (("aaaa1111bbbb", 1.0), ("aaaa1111bbbb+", 5.0), ("cccc2222dddd", 1.5)):
        write(results / "rows.jsonl", make_row(median, environment=replace(where, commit=commit)))
    words = ["--results", str(tmp_path / "results")]
    assert rows.main(["compare", "aaaa1111", "cccc2222dddd9999", *words]) == 1
    assert " 1.500 " in capsys.readouterr().out
    assert rows.main(["compare", "aaaa1111+", "aaaa1111", *words]) == 0
    assert " 0.200 " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["nothing", "a.jsonl"], ["a.jsonl", "other.jsonl"], ["a.jsonl", "a.jsonl", "--limit", "0"]]
)
def test_bad_input(
    words: list[str],
    make_row: MakeRow,
    where: Environment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "a.jsonl", make_row())
    write(tmp_path / "other.jsonl", make_row(environment=replace(where, device="Other CPU")))
    monkeypatch.chdir(tmp_path)
    assert rows.main(["compare", *words, "--results", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
