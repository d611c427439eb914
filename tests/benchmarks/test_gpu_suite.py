"""The plans of the GPU suite and how their stages are run, cut off and resumed; every plan is rehearsed to its end."""

import functools
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite, measure, worker
from benchmarks.cases import NOTHING_HERE, Outcome, Session
from benchmarks.gpu_suite import PLANS, Stage, StageResult, SuiteRun, run_stage, run_stages
from benchmarks.rows import FAILED, ROOT, TIMED, ResultRow, RowWriter, read_rows

MakeRow = Callable[..., ResultRow]
MOST_FILES = 7


@pytest.fixture
def run(tmp_path: Path) -> SuiteRun:
    return SuiteRun(tmp_path, rehearsal=True)


def fake(script: str, name: str = "one", seconds: float = 30) -> Stage:
    return Stage(name, "a stage", seconds, lambda *_: [sys.executable, "-c", script])


# Plans


def test_the_plans_fit_their_minutes() -> None:
    assert list(PLANS)[:5] == ["check", "operations", "step", "inference", "tune"]
    assert PLANS["check"].minutes <= 2
    for name, plan in PLANS.items():
        names = [stage.name for stage in plan.stages]
        assert plan.minutes <= 5, name
        assert len(set(names)) == len(names), name
        assert all(stage.seconds <= 60 * plan.minutes for stage in plan.stages), name


def test_the_step_begins_with_what_matters_most() -> None:
    names = [stage.name for stage in PLANS["step"].stages]
    first = ["step_smollm2-135m", "profile_smollm2-135m", "step_mistral-7b", "step_fp8"]
    assert names[:4] == first
    limits = [stage.seconds for stage in PLANS["step"].stages if stage.name in (*first, "profile_mistral-7b")]
    assert sum(limits) <= 60 * PLANS["step"].minutes


def test_large_models_have_a_process_for_each_provider(run: SuiteRun) -> None:
    """On a card of 80 GB they do not fit beside each other."""
    for stage in PLANS["step"].stages:
        command = stage.command(replace(run, rehearsal=False), 60)
        assert isinstance(command, list)
        if "mistral-7b" in command and "--providers" in command:
            assert "," not in command[command.index("--providers") + 1], stage.name


def test_choose() -> None:
    stages = PLANS["inference"].stages
    assert gpu_suite.choose(stages, "") == list(stages)
    assert [stage.name for stage in gpu_suite.choose(stages, "demo,inference")] == ["inference", "demo"]
    with pytest.raises(ValueError, match=r"--only must name stages of the plan \(inference, .*\), but has infrence"):
        gpu_suite.choose(stages, "infrence")


def test_a_bad_option_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--plan", "check", "--out", str(tmp_path), "--only", "chek"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--plan", "inference", "--out", str(tmp_path), "--only", "inference"]) == 1
    assert "inference: failed there is no GPU that this torch can use; --rehearse" in capsys.readouterr().out
    assert not (tmp_path / "rows.jsonl").exists()


# The rehearsal


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of a plan's commands are called with their words, instead of 20 processes that import PyTorch.

    The commands that begin processes of their own have them.
    """
    plain = gpu_suite.execute

    def execute(command: Sequence[str], log: Path, seconds: float) -> int | None:
        words = list(command)
        if words[0] == "env":
            words = words[next(place for place, word in enumerate(words) if word == sys.executable) :]
        module = words[2]
        if words[:2] != [sys.executable, "-m"] or module == "benchmarks.tune" or "compile" in words[3:4]:
            return plain(command, log, seconds)
        with log.open("a", encoding="utf-8") as file:
            file.write(" ".join(words[2:]) + "\n")
        return importlib.import_module(module).main(words[3:])

    small = functools.partial(measure.measure_ceilings, small=True)
    monkeypatch.setattr("benchmarks.train_step.measure_ceilings", small)
    monkeypatch.setattr(gpu_suite, "execute", execute)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_comes_to_its_end(plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu_suite.main(["--plan", plan, "--out", str(tmp_path), "--rehearse"])
    results = gpu_suite.read_results(tmp_path)
    assert [(name, e["detail"]) for name, e in results.items() if e["status"] not in ("done", "skipped")] == []
    assert status == 0
    assert set(results) == {stage.name for stage in PLANS[plan].stages}
    skipped = {name for name, entry in results.items() if entry["status"] == "skipped"}
    without_triton = {"compile"} | {name for name in results if name.startswith("tune_")}
    there = importlib.util.find_spec("triton") is not None
    assert skipped == {s.name for s in PLANS[plan].stages if s.needs_gpu or (not there and s.name in without_triton)}
    _expected_files(plan, tmp_path)
    assert "not run" not in capsys.readouterr().out.split("\nstage ")[-1]


def _expected_files(plan: str, folder: Path) -> None:
    rows = read_rows(folder / "rows.jsonl") if (folder / "rows.jsonl").is_file() else []
    timed = {row.kernel for row in rows if row.status in TIMED}
    if plan == "operations":
        assert timed >= {"context_state", "low_rank_polar", "lowrank_linear", "AdapterGenerator", "ceiling"}
    if plan == "inference":
        assert timed >= {"contextualisation", "decoding", "adapter_generation"}
    if plan == "step":
        providers = {row.provider for row in rows if row.kernel == "train_step" and row.status in TIMED}
        assert providers >= {"trainer", "dense_lora", "frozen_base", "reference", "auto", "recompute"}
        assert {row.shape for row in rows if row.kernel == "train_step"} == {"preset=tiny", "preset=tiny fp8"}
        report = json.loads((folder / "profile.json").read_text(encoding="utf-8"))["tiny trainer"]
        assert report["kernels"]
        assert report["busy_ms"] > 0


def test_all_plans_leave_few_files(run: SuiteRun) -> None:
    """What the commands name, beside the rows, the log and the statuses."""
    named = {"rows.jsonl", "log.txt", "stages.json"}
    for plan in PLANS.values():
        for stage in plan.stages:
            command = stage.command(replace(run, rehearsal=False), 60)
            words = command if isinstance(command, list) else []
            named |= {Path(word).name for word in words if word.startswith(f"{run.folder}/")}
    assert named >= {"profile.json", "tuned.json", "demo.json"}
    assert len(named) <= MOST_FILES


# Stages


@pytest.mark.parametrize(
    ("script", "status", "detail"),
    [
        ("print('hello')", "done", ""),
        ("raise SystemExit(3)", "failed", "exit status 3; see log.txt"),
        (f"raise SystemExit({NOTHING_HERE})", "skipped", "nothing of it can run here"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed", "ended by signal 11"),
        (f"raise SystemExit({gpu_suite.RESTART})", "failed", "the GPU context broke again and again"),
    ],
)
def test_how_a_stage_ends(
    script: str, status: str, detail: str, run: SuiteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "MOST_RESTARTS", 2)
    result = run_stage(fake(script), run, 30)
    assert result.status == status
    assert detail in result.detail
    if status == "done":
        assert (run.folder / "log.txt").read_text(encoding="utf-8") == "hello\n"


def test_what_needs_a_gpu_is_left_out_of_a_rehearsal(run: SuiteRun) -> None:
    result = run_stage(replace(fake("raise SystemExit(1)"), needs_gpu=True), run, 30)
    assert (result.status, result.detail) == ("skipped", "needs a GPU")


@pytest.mark.parametrize(("left", "limit"), [(1.5, 30.0), (30.0, 1.5)])
def test_a_stage_is_cut_off_and_what_it_said_is_kept(left: float, limit: float, run: SuiteRun) -> None:
    script = "import time; print('begun', flush=True); time.sleep(60)"
    result = run_stage(fake(script, seconds=limit), run, left)
    assert result.status == "not run"
    assert result.seconds < 10
    assert (run.folder / "log.txt").read_text(encoding="utf-8") == "begun\n"


def test_children_end_with_their_stage(run: SuiteRun) -> None:
    sleeper = "import time; time.sleep(60)"
    script = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {sleeper!r}]).pid, flush=True)"
    assert run_stage(fake(script), run, 30).status == "done"
    child = int((run.folder / "log.txt").read_text(encoding="utf-8"))
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_time_of_a_plan_ends_the_run_and_the_rest_is_named(run: SuiteRun) -> None:
    results = run_stages([fake("import time; time.sleep(60)"), fake("", "two")], run, 1.0)
    assert [result.status for result in results.values()] == ["not run", "not run"]
    assert "before it began" in results["two"].detail
    assert run_stages([fake("")], run, 30)["one"].status == "done"


def test_a_failed_stage_runs_again_and_a_done_one_does_not(run: SuiteRun) -> None:
    assert run_stages([fake("raise SystemExit(1)")], run, 30)["one"].status == "failed"
    assert run_stages([fake("")], run, 30)["one"].detail == ""
    assert run_stages([fake("raise SystemExit(1)")], run, 30)["one"] == StageResult("done", "in an earlier run")


# Workers


def test_a_worker_in_a_process_of_its_own(run: SuiteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = next(stage for stage in PLANS["operations"].stages if stage.name == "other_operations")
    assert run_stage(stage, run, 120).status == "done"
    measured = [row for row in read_rows(run.rows) if row.kernel != "ceiling"]
    assert {row.provider for row in measured} == {"svd_lowrank", "baddbmm"}
    assert all(row.p50_ms and row.environment.commit for row in measured)


def test_a_worker_leaves_out_what_is_measured(run: SuiteRun) -> None:
    assert worker.measure("other_operations", run) == 0
    first = read_rows(run.rows)
    assert worker.measure("other_operations", run) == 0
    assert read_rows(run.rows) == first


def test_the_ceilings_are_measured_once_for_a_folder(run: SuiteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker.measure("modules", run) == 0
    monkeypatch.setattr(worker, "measure_ceilings", lambda *_, **__: pytest.fail("they are there"))
    assert worker.measure("other_operations", run) == 0
    rows = read_rows(run.rows)
    assert {row.mode for row in rows if row.kernel == "ceiling"} == {"gemm", "copy"}
    assert all(row.gemm_share for row in rows if row.provider == "baddbmm")


def test_a_broken_context_starts_the_worker_again_behind_the_case(
    run: SuiteRun, make_row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RowWriter(run.rows)
    writer.write(make_row())  # of an earlier stage

    def run_case(case: Any, provider: str, session: Session) -> Outcome:
        names = dict(zip(("kernel", "mode", "shape", "dtype"), case.key, strict=True))
        row = make_row(None, **names, provider=provider, environment=session.environment)
        return Outcome(replace(row, status=FAILED, detail="AcceleratorError: CUDA error: an illegal memory access"))

    monkeypatch.setattr(worker, "run_case", run_case)
    statuses = [worker.measure("other_operations", run, since=1) for _ in range(5)]
    assert statuses == [gpu_suite.RESTART] * 4 + [0]
    assert len([row for row in read_rows(run.rows) if row.status == FAILED]) == 4


def test_flash_attention_is_skipped_where_it_is_not_installed(run: SuiteRun) -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("it is installed")
    assert worker.main(["flash_attention", "--out", str(run.folder)]) == NOTHING_HERE


# Tables


def test_the_table_shows_floors_and_no_times_of_wrong_cases(make_row: MakeRow) -> None:
    right = make_row(flops=780e12, bytes=4.3e9, dtype="bfloat16", gemm_share=0.5)
    wrong = make_row(None, status="wrong", detail="0.3 from the oracle, 0.001 allowed")
    step = make_row(None, kernel="train_step", status="not available", detail="a step takes about 90.0 GB")
    lines = gpu_suite.table([right, wrong, make_row(None, status="not available"), step])
    assert len(lines) == 4
    assert lines[1].split()[-2:] == ["1e+03", "1e+03"]
    assert "wrong" in lines[2]
    assert "0.3 from the oracle" in lines[2]
    assert "a step takes about 90.0 GB" in lines[3]
    assert gpu_suite.floor_ms(replace(right, dtype="float32")) == pytest.approx([1.0, 4.3 / 3.35])


def test_the_share_of_the_base_models_rate(make_row: MakeRow) -> None:
    names = {"kernel": "contextualisation", "shape": "tokens=2048 d_h=4"}
    rows = [make_row(5.0, provider="auto", **names), make_row(3.0, provider="base_chunks", **names), make_row()]
    assert gpu_suite.shares(rows) == ["", "tokens=2048: 0.60 of the base model's rate"]
    assert gpu_suite.shares(rows[:1]) == []


# The tests of the kernels, in processes


def sharded(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests/sharding.py", "-m", "", *words, str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture
def tests_of_ones_own(tmp_path: Path) -> Path:
    """A folder with the parts and the skips of this repository's conftest, without its imports."""
    conftest = (
        "import sys; sys.path.insert(0, {here!r})\nimport sharding\n"
        "def pytest_addoption(parser): parser.addoption('--shard', type=sharding.parse)\n"
        "def pytest_collection_modifyitems(config, items): items[:] = sharding.part_of(items, config.option.shard)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = large\n")
    (tmp_path / "conftest.py").write_text(conftest.format(here=str(ROOT / "tests")))
    return tmp_path


def test_what_fails_in_a_part_fails_the_run(tests_of_ones_own: Path) -> None:
    (tests_of_ones_own / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_n(n): assert n != 2\n"
    )
    done = sharded(tests_of_ones_own, "--processes", "2")
    assert done.returncode == 1
    assert "test_n[2]" in done.stdout
    assert "part 2/2: exit status 0" in done.stdout
    (tests_of_ones_own / "test_it.py").write_text("def test_one(): pass\n")
    assert sharded(tests_of_ones_own, "--processes", "2").returncode == 0  # one of the two has no test
    (tests_of_ones_own / "test_it.py").write_text("")
    assert sharded(tests_of_ones_own, "--processes", "2").returncode == 5


def test_parts_that_take_too_long_say_what_failed_until_then(tests_of_ones_own: Path) -> None:
    (tests_of_ones_own / "test_it.py").write_text(
        "import time\ndef test_a(): assert False\ndef test_b(): time.sleep(60)\n"
    )
    done = sharded(tests_of_ones_own, "--processes", "1", "--seconds", "8")
    assert done.returncode == 1
    assert "the time is over for part 1/1" in done.stdout
    assert "FAILED" in done.stdout
    assert "test_a" in done.stdout
