"""The stages of the GPU suite: chosen, run, cut off, resumed; a machine without a GPU is told so."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite, stages, worker
from benchmarks.cases import Outcome, Session
from benchmarks.rows import FAILED, Row, RowWriter, read_rows
from benchmarks.stages import STAGES, Stage, run_stage
from benchmarks.worker import Settings

MakeRow = Callable[..., Row]
CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings("", tmp_path, CPU, torch.float32, "tiny", 0.001, None, 0)


def fake(script: str, name: str = "operations", **entries: bool) -> Stage:
    return Stage(name, "a stage", 1, True, lambda _: [sys.executable, "-c", script], **entries)


def test_choose() -> None:
    default = [stage.name for stage in gpu_suite.choose("", "")]
    assert default == ["device", "build", "tests", "operations", "training", "modules", "inference"]
    assert sum(stage.minutes for stage in gpu_suite.choose("", "")) <= 9
    assert [stage.name for stage in gpu_suite.choose("inference,device", "")] == ["device", "inference"]
    assert [stage.name for stage in gpu_suite.choose("all", "tests")] == [n for n in stages.NAMES if n != "tests"]
    with pytest.raises(ValueError, match="no stage is called devce; there are device, "):
        gpu_suite.choose("devce", "")
    with pytest.raises(ValueError, match="no stage is left"):
        gpu_suite.choose("device", "device")


@pytest.mark.parametrize("words", [["--only", "devce"], ["--budget-minutes", "0"], ["--seconds", "nan"]])
def test_bad_options_are_one_line(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--only", "operations,build"]) == 1
    output = capsys.readouterr().out
    assert "operations: failed there is no GPU that this torch can use" in output
    assert "build: skipped there are no CUDA sources" in output or "build: " in output
    assert not worker.rows_file(tmp_path).exists()


def test_a_gpu_stage_on_a_cpu(settings: Settings) -> None:
    result = run_stage(next(stage for stage in STAGES if stage.name == "tests"), settings, 10)
    assert (result.status, result.detail) == ("failed", "this stage needs a GPU")


def test_the_command_measures_on_a_cpu_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path), "--device", "cpu", "--preset", "tiny", "--only", "device,operations"]
    words += ["--seconds", "0.001", "--providers", "eager,base_gemm"]
    assert gpu_suite.main([*words, "--skip", "operations"]) == 0
    assert {row.mode for row in read_rows(tmp_path / "rows.jsonl")} == {"gemm", "copy"}
    assert gpu_suite.main(words) == 0
    output = capsys.readouterr().out
    assert "device: done in an earlier run" in output
    measured = [row for row in read_rows(tmp_path / "rows.jsonl") if row.kernel != "ceiling"]
    assert len(measured) == 8
    assert all(row.p50_ms and row.environment.commit for row in measured)
    assert "lowrank_linear backward" in output.split("\nstage ")[-1]
    assert (tmp_path / "rows.csv").read_text(encoding="utf-8").count("\n") == 2 + len(measured) + 1
    assert set(json.loads((tmp_path / "stages.json").read_text(encoding="utf-8"))) == {"device", "operations"}


@pytest.mark.parametrize(
    ("script", "status", "detail"),
    [
        ("print('hello')", "done", ""),
        ("raise SystemExit(3)", "failed", "exit status 3; see operations.log"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed", "ended by signal 11"),
        (f"raise SystemExit({worker.RESTART})", "failed", "the GPU context broke again and again"),
    ],
)
def test_how_a_stage_ends(
    script: str, status: str, detail: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "MOST_RESTARTS", 2)
    result = run_stage(fake(script), settings, 30)
    assert result.status == status
    assert detail in result.detail
    if status == "done":
        assert (settings.folder / "operations.log").read_text(encoding="utf-8") == "hello\n"


def test_no_tests_is_no_failure(settings: Settings) -> None:
    assert run_stage(fake("raise SystemExit(5)", no_tests=True), settings, 30).status == "skipped"
    assert run_stage(fake("raise SystemExit(5)"), settings, 30).status == "failed"


def test_a_stage_is_cut_off_and_what_it_said_is_kept(settings: Settings) -> None:
    result = run_stage(fake("import time; print('begun', flush=True); time.sleep(60)"), settings, 1.5)
    assert result.status == "not run"
    assert result.seconds < 10
    assert (settings.folder / "operations.log").read_text(encoding="utf-8") == "begun\n"


def test_the_budget_ends_the_run_and_the_rest_is_named(settings: Settings) -> None:
    chosen = [fake("import time; time.sleep(60)", "operations"), fake("", "modules")]
    results = gpu_suite.run_stages(chosen, settings, 1.0, again=False)
    assert [result.status for result in results.values()] == ["not run", "not run"]
    assert "before it began" in results["modules"].detail
    assert gpu_suite.run_stages([fake("")], settings, 30, again=False)["operations"].status == "done"


def test_a_failed_stage_runs_again_and_a_done_one_does_not(settings: Settings) -> None:
    assert gpu_suite.run_stages([fake("raise SystemExit(1)")], settings, 30, False)["operations"].status == "failed"
    assert gpu_suite.run_stages([fake("")], settings, 30, False)["operations"].detail == ""
    assert gpu_suite.run_stages([fake("raise SystemExit(1)")], settings, 30, False)["operations"].status == "done"
    assert gpu_suite.run_stages([fake("raise SystemExit(1)")], settings, 30, True)["operations"].status == "failed"
    other = replace(settings, preset="cpu")
    assert gpu_suite.run_stages([fake("raise SystemExit(1)")], other, 30, False)["operations"].status == "failed"


def test_a_worker_leaves_out_what_is_measured(settings: Settings) -> None:
    chosen = replace(settings, stage="operations", providers=("eager",))
    assert worker.run(chosen) == 0
    first = read_rows(worker.rows_file(settings.folder))
    assert worker.run(chosen) == 0
    assert read_rows(worker.rows_file(settings.folder)) == first
    assert worker.run(replace(chosen, providers=("eager", "baddbmm"))) == 0
    assert len(read_rows(worker.rows_file(settings.folder))) == len(first) + 2


def test_a_broken_context_starts_the_worker_again_behind_the_case(
    settings: Settings, make_row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    RowWriter(worker.rows_file(settings.folder)).write(make_row())  # of an earlier stage

    def run_case(case: object, provider: str, session: Session) -> Outcome:
        names = worker.case_key(case)  # type: ignore[arg-type]
        row = make_row(None, **dict(zip(("kernel", "mode", "shape", "dtype"), names, strict=True)), provider=provider)
        return Outcome(replace(row, status=FAILED, detail="AcceleratorError: CUDA error: an illegal memory access"))

    monkeypatch.setattr(worker, "run_case", run_case)
    chosen = replace(settings, stage="operations", providers=("eager",), since=1)
    statuses = [worker.run(chosen) for _ in range(7)]
    assert statuses == [worker.RESTART] * 6 + [0]
    assert len(read_rows(worker.rows_file(settings.folder))) == 7


def test_training_that_writes_nothing_is_a_failed_row(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.training, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no memory')"])
    assert worker.run(replace(settings, stage="training")) == 1
    (row,) = read_rows(worker.rows_file(settings.folder))
    assert (row.status, row.detail) == (FAILED, "benchmarks.train_step wrote no results: no memory")


def test_settings_survive_the_command_line(settings: Settings) -> None:
    chosen = replace(settings, stage="device", providers=("a", "b"), dtype=torch.bfloat16)
    seen: list[Settings] = []
    worker_run, worker.run = worker.run, lambda given: seen.append(given) or 0  # type: ignore[func-returns-value]
    try:
        assert worker.main(worker.to_words(chosen)) == 0
    finally:
        worker.run = worker_run
    assert seen == [chosen]


def test_the_table_shows_floors_and_no_times_of_wrong_cases(make_row: MakeRow) -> None:
    right = make_row(flops=780e12, bytes=4.3e9, dtype="bfloat16", gemm_share=0.5)
    wrong = make_row(None, status="wrong", detail="0.3 from the oracle, 0.001 allowed")
    lines = gpu_suite.table([right, wrong, make_row(None, status="not available")])
    assert len(lines) == 3
    assert lines[1].split()[-2:] == ["1e+03", "1e+03"]
    assert "wrong" in lines[2]
    assert "0.3 from the oracle" in lines[2]
    assert gpu_suite.floor_ms(replace(right, dtype="float32")) == pytest.approx([1.0, 4.3 / 3.35])
