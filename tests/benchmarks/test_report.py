"""docs/results.md: every number names its device, versions and commit, and nothing is said of what was not run."""

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.rows import RESULTS, ROOT, Environment, ResultRow, RowWriter, newest, read_rows

MakeRow = Callable[..., ResultRow]


@pytest.fixture
def gpu(where: Environment) -> Environment:
    versions = {"triton": "3.6.0", "cuda": "13.0", "commit": "feedfeedfeed"}
    return replace(where, device="NVIDIA H200", kind="gpu", clocks="1980 MHz SM, 3201 MHz memory", **versions)


def test_without_rows_everything_is_not_yet_run() -> None:
    text = report.document([])
    assert text.count("**Not yet run** on a GPU") == len(report.KERNELS)
    assert "(pretraining.md)" in text


def test_a_kernel_that_was_measured_on_a_gpu(make_row: MakeRow, gpu: Environment) -> None:
    text = report.document([make_row(kernel="low_rank_polar"), make_row(environment=gpu, kernel="low_rank_polar")])
    versions = "NVIDIA H200, 1980 MHz SM, 3201 MHz memory; torch 2.13.0, Triton 3.6.0, CUDA 13.0, Python 3.11.7"
    assert f"- **{versions}; commit feedfeedfeed**, 2026-01-01: low_rank_polar" in text
    section = text.split("`low_rank_polar`\n")[1].split("\n## ")[0]
    assert "Not yet run" not in section
    rows = [line for line in section.splitlines() if line.startswith("| NVIDIA") or line.startswith("| Some")]
    assert rows == [
        "| NVIDIA H200 | feedfeedfeed | T=8 | float32 | 2 |",
        "| Some CPU, 1 thread(s) | 0123456789ab | T=8 | float32 | 2 |",
    ]
    assert text.count("**Not yet run** on a GPU") == len(report.KERNELS) - 1


def test_providers_stand_side_by_side(make_row: MakeRow) -> None:
    rows = [
        make_row(3.0, mode="backward"),
        make_row(2.0),
        make_row(1.0, provider="base_gemm", status="floor"),
        make_row(None, provider="cuda", mode="backward", status="wrong", detail="0.5 from the oracle", error=0.5),
    ]
    assert report.side_by_side(rows)[0].endswith("| dtype | eager | base_gemm (floor) | cuda |")
    assert report.side_by_side(rows)[2].endswith("| float32 | 2 / 3 | 1 / - | - / wrong: 0.5 from the oracle |")
    text = report.document([*rows, make_row(None, provider="triton", status="not available", detail="there is none")])
    assert "there is none" not in text


def test_the_least_possible_time_of_a_known_gpu(make_row: MakeRow, gpu: Environment) -> None:
    known = make_row(flops=780e12, bytes=1.0, dtype="bfloat16", environment=gpu)
    lines = report.side_by_side([known, make_row(flops=780e12, bytes=1.0, dtype="bfloat16")])
    assert lines[0].endswith("| least possible, computed |")
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["1e+03 |", " |"]


def test_commits_are_kept_apart(make_row: MakeRow, where: Environment) -> None:
    rows = [make_row(), make_row(provider="x", environment=replace(where, commit="other"))]
    assert len(report.environments(rows)) == 2
    assert len(report.side_by_side(rows)) == 4
    later = make_row(provider="x", environment=replace(where, date="2027-01-01T00:00:00Z"))
    (line,) = report.environments([make_row(), later])
    assert "2026-01-01 to 2027-01-01: context_state" in line


def test_training_steps(make_row: MakeRow) -> None:
    metrics = {"segment_tokens_per_s": 1234.5, "mfu": 0.25, "over_dense_lora": 1.05}
    (*_, line) = report.steps([make_row(kernel="train_step", mode="step", shape="preset=tiny", metrics=metrics)])
    assert line.endswith("| tiny | float32 | eager | 2 | 1234 | 25.0% |  |  | 1.05 |")


def test_the_full_table_has_a_line_for_each_row(make_row: MakeRow) -> None:
    rows = [make_row(metrics={"mfu": 0.5, "parts_s.polar": 1.0}), make_row(None, status="wrong", detail="a, b")]
    first, second = csv.DictReader(io.StringIO(report.to_csv(rows)))
    assert (first["p50_ms"], first["metrics"], first["commit"]) == ("2", "mfu=0.5", rows[0].environment.commit)
    assert (second["p50_ms"], second["detail"]) == ("", "a, b")


def test_the_committed_page_and_tables_are_those_of_the_committed_rows() -> None:
    rows = newest(read_rows(RESULTS))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page.split("## Plots")[0].rstrip() == report.document(rows).rstrip()
    for folder in {row.environment.folder for row in rows}:
        own = [row for row in rows if row.environment.folder == folder]
        assert (RESULTS / folder / "rows.csv").read_text(encoding="utf-8") == report.to_csv(own)


def test_the_command(make_row: MakeRow, gpu: Environment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    writer = RowWriter(tmp_path / "results" / "nvidia-h200" / "rows.jsonl")
    writer.write(make_row(flops=1e9, bytes=1e6, environment=gpu))
    for length in (1024, 2048):
        writer.write(make_row(kernel="contextualisation", shape=f"tokens={length} d_h=4", environment=gpu))
    out = tmp_path / "docs" / "results.md"
    out.parent.mkdir()
    words = ["--results", str(tmp_path / "results"), "--out", str(out)]
    assert report.main(words) == 0
    names = [f"gpu-nvidia-h200-{what}.svg" for what in ("roofline", "providers", "context")]
    assert sorted(path.name for path in (out.parent / "plots").iterdir()) == sorted(names)
    assert all(f"(plots/{name})" in out.read_text(encoding="utf-8") for name in names)
    assert all((out.parent / "plots" / name).stat().st_size < 100_000 for name in names)
    assert (tmp_path / "results" / "nvidia-h200" / "rows.csv").read_text(encoding="utf-8").count("\n") == 4
    first = {name: (out.parent / "plots" / name).read_bytes() for name in names}
    assert report.main(words) == 0
    assert first == {name: (out.parent / "plots" / name).read_bytes() for name in names}
    writer.path.write_text("{}\n", encoding="utf-8")
    capsys.readouterr()
    assert report.main(words) == 2
    assert "rows.jsonl, line 1, is not a row" in capsys.readouterr().err
