"""The training-step benchmark: its file, its exit status, and that a wrong provider gets no time."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluation.counted import PRODUCTS
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step_providers, train_step
from benchmarks.cases import NOTHING_HERE
from benchmarks.measure import PartClock, part, running
from benchmarks.presets import PRESETS, check_preset, make_batch, make_model, step_flops
from benchmarks.rows import ResultRow, read_rows
from benchmarks.step_providers import PROVIDERS, provider_error
from benchmarks.train_step import Contender, StepSettings, extrapolate, main

CPU = torch.device("cpu")
TINY = ("--preset", "tiny", "--device", "cpu", "--steps", "2", "--threads", "1")
TIMES = ("p20_ms", "p50_ms", "p80_ms", "peak_bytes")


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train_step.measure_ceilings
    monkeypatch.setattr(train_step, "measure_ceilings", lambda *arguments: plain(*arguments, small=True))


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "results.json"
    status = main([*TINY, *arguments, "--json", str(file)])
    return status, json.loads(file.read_text(encoding="utf-8"))


def rows_of(results: dict[str, Any]) -> dict[str, ResultRow]:
    return {row["provider"]: ResultRow.from_dict(row) for row in results["rows"]}


def parts_of(row: ResultRow) -> dict[str, float]:
    return {name.removeprefix("parts_s."): value for name, value in row.metrics.items() if name.startswith("parts_s.")}


def is_timed(row: ResultRow) -> bool:
    """Whether it has all of them; a row has all or none."""
    values = [getattr(row, name) for name in TIMES]
    assert all(value is None or value > 0 for value in values)
    assert all(values) != all(value is None for value in values)
    return all(values)


def test_every_provider_that_runs_here_has_a_complete_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("reference", "auto", "eager", "dense_lora", "frozen_base")
    status, results = run(tmp_path, "--providers", ",".join(names))
    assert status == 0
    rows = rows_of(results)
    assert tuple(rows) == names
    for name, row in rows.items():
        assert is_timed(row), name
        assert row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.metrics["segment_tokens_per_s"] == pytest.approx(4 * 32 / (1e-3 * row.p50_ms))
        assert row.error <= 1e-6
        parts = parts_of(row)
        assert {"base_forward", "adapted_linear", "loss", "backward", "optimizer"} <= set(parts)
        assert 0 < sum(parts.values()) <= 1.2 * 1e-3 * row.p80_ms
        assert {"generator", "polar"} <= set(parts) or name in ("dense_lora", "frozen_base")
        assert row.environment.threads == 1
    assert rows["auto"].metrics["over_dense_lora"] == results["ratios"]["auto/dense_lora"]["median"]
    assert results["ratios"]["auto/dense_lora"]["median"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_rows_of_given_times() -> None:
    def ran(name: str, seconds: list[float], peak: int) -> Contender:
        runner: Any = SimpleNamespace(seconds=seconds, parts=[{"polar": 1.0}] * len(seconds), peak=peak)
        return Contender(name, error=1e-9, runners=[runner])

    contenders = [
        ran("auto", [1.0, 2.0, 4.0], 10),
        ran("dense_lora", [1.0, 1.0, 1.0], int(90e9)),
        Contender("reference", "wrong", "off", 0.5),
    ]
    settings = StepSettings(replace(PRESETS["tiny"], quantization="fp8"), ("auto", "dense_lora", "reference"), CPU)
    auto, floor, wrong = train_step.result_rows("tiny", settings, contenders, 1e9)
    assert (auto.status, auto.shape, auto.dtype) == ("ok", "preset=tiny fp8", "float32")
    assert (auto.p20_ms, auto.p50_ms, auto.p80_ms) == pytest.approx((1400, 2000, 3200))
    assert (auto.samples, auto.error, auto.peak_bytes) == (3, 1e-9, 10)
    assert auto.metrics.pop("mfu") == pytest.approx(step_flops(settings.preset) / 2e9)
    assert auto.metrics.pop("estimated_bytes") > 0
    assert auto.metrics == {
        "segment_tokens_per_s": settings.preset.segment_tokens / 2,
        "fits.H200": 1,
        "fits.H100": 1,
        "parts_s.polar": 1,
        "over_dense_lora": 2,
    }
    assert (floor.status, floor.metrics["fits.H200"], floor.metrics["fits.H100"]) == ("floor", 1, 0)
    assert (wrong.status, wrong.detail, wrong.p50_ms, wrong.metrics) == ("wrong", "off", None, {})


def test_the_trainer_takes_steps_of_its_own(tmp_path: Path) -> None:
    status, results = run(tmp_path, "--providers", "auto,trainer")
    assert status == 0
    row = rows_of(results)["trainer"]
    assert is_timed(row)
    assert row.error <= 1e-6
    assert {"trainer", "generator", "polar", "adapted_linear", "loss"} <= set(parts_of(row))


def test_the_library_needs_less_memory_than_the_baseline_and_more_than_the_floors() -> None:
    preset = replace(PRESETS["tiny"], window=128, hidden=128, state_size=64)
    settings = StepSettings(preset, ("reference", "auto", "dense_lora", "frozen_base"), CPU, steps=1)
    peaks = {contender.name: contender.runners[0].peak for contender in train_step.measure(settings)}
    assert peaks["reference"] > peaks["auto"] > peaks["frozen_base"]
    assert peaks["dense_lora"] > peaks["frozen_base"]


def test_a_missing_kernel_is_said_in_a_line_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(step_providers.LIBRARY, "cuda", "no_such_backend")
    status, results = run(tmp_path, "--providers", "cuda,auto")
    rows = rows_of(results)
    assert status == 1
    assert rows["cuda"].status == "not available"
    assert "no_such_backend" in rows["cuda"].detail
    assert not is_timed(rows["cuda"])
    assert is_timed(rows["auto"])
    assert "cuda: not available: GAKERNELS_BACKEND" in capsys.readouterr().err


def failing(error: Exception) -> Callable[..., Any]:
    def step(self: train_step.StepRunner, batch: object) -> None:
        if not self.trainee.parameters:  # frozen_base
            raise error
        plain_step(self, batch)

    plain_step = train_step.StepRunner.step
    return step


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 GB"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (ValueError("something else"), "failed"),
    ],
)
def test_a_provider_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    monkeypatch.setattr(train_step.StepRunner, "step", failing(error))
    exit_status, results = run(tmp_path, "--providers", "frozen_base,auto")
    rows = rows_of(results)
    assert exit_status == 1
    assert rows["frozen_base"].status == status
    assert str(error) in rows["frozen_base"].detail
    assert not is_timed(rows["frozen_base"])
    assert is_timed(rows["auto"])


def test_a_model_that_needs_more_than_the_free_memory_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    available = train_step._available_bytes()
    if available is None:
        pytest.skip("this system does not say how much memory is free")
    huge = replace(PRESETS["tiny"], vocabulary=available // 8)  # the embeddings alone would take 32 times that
    monkeypatch.setitem(PRESETS, "huge", huge)
    assert main(["--preset", "huge", "--device", "cpu", "--providers", "auto"]) == 1
    assert capsys.readouterr().err == "out of memory: the base model of huge does not fit on cpu\n"


def test_a_run_that_is_cut_off_leaves_the_turns_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = train_step.StepRunner.timed_step, []

    def interrupted(runner: train_step.StepRunner, batch: Any) -> None:
        calls.append(runner)
        if len(calls) == 3:
            raise KeyboardInterrupt
        plain(runner, batch)

    monkeypatch.setattr(train_step.StepRunner, "timed_step", interrupted)
    file = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        main([*TINY, "--providers", "auto,frozen_base", "--json", str(file)])
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["turns"] == 1
    assert [row["samples"] for row in results["rows"]] == [1, 1]


def test_the_results_are_rows_too_and_the_time_ends_the_turns(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    status, results = run(tmp_path, "--providers", "auto,frozen_base", "--rows", str(file), "--seconds", "0.001")
    assert status == 0
    assert results["turns"] == 1
    rows = read_rows(file)
    assert [(row.provider, row.shape, row.samples) for row in rows] == [
        ("auto", "preset=tiny", 1),
        ("frozen_base", "preset=tiny", 1),
    ]
    assert all(row.metrics["segment_tokens_per_s"] > 0 for row in rows)


def test_a_provider_that_can_not_run_here_is_nothing_to_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(step_providers.LIBRARY, "cuda", "no_such_backend")
    status, results = run(tmp_path, "--providers", "cuda")
    assert status == NOTHING_HERE
    assert rows_of(results)["cuda"].status == "not available"


def test_a_wrong_provider_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = step_providers.make_trainee

    def wrong(name: str, *arguments: Any, **options: Any) -> step_providers.Trainee:
        trainee = plain(name, *arguments, **options)
        if name != "dense_lora":
            return trainee
        return replace(trainee, loss=lambda batch: trainee.loss(batch) * (1 + 1e-4))

    monkeypatch.setattr(step_providers, "make_trainee", wrong)
    status, results = run(tmp_path, "--providers", "dense_lora,auto")
    rows = rows_of(results)
    assert status == 1
    assert rows["dense_lora"].status == "wrong"
    assert rows["dense_lora"].error == pytest.approx(1e-4, rel=1e-3)
    assert not is_timed(rows["dense_lora"])
    assert rows["auto"].status == "ok"


@pytest.mark.parametrize("preset", ["cpu-mid", "mistral-7b", "qwen3-8b", "smollm2-135m"])
@pytest.mark.parametrize("provider", ["reference", "auto", "trainer", "dense_lora", "frozen_base"])
def test_providers_are_right_on_every_family(preset: str, provider: str) -> None:
    assert provider_error(provider, PRESETS[preset], CPU, seed=3) <= 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "huge"), "--preset must be one of tiny, cpu-mid, smollm2-135m"),
        (("--providers", "auto,magic"), "--providers must be out of reference, auto"),
        (("--providers", ""), "but has ''"),
        (("--threads", "0"), "--threads must be at least 1, but it is 0"),
        (("--steps", "0"), "--steps must be at least 1, but it is 0"),
        (("--steps", "many"), "--steps: invalid int value"),
        (("--seconds", "0"), "--seconds must be above 0, but it is 0"),
        (("--rows", "no/such/folder/rows.jsonl"), "--rows: the folder no/such/folder does not exist"),
        (("--json", "no/such/folder/file.json"), "the folder no/such/folder does not exist"),
    ],
)
def test_bad_arguments_exit_with_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_extrapolation_is_a_straight_line_through_the_measured_layers() -> None:
    preset = replace(PRESETS["tiny"], layers=80, measured_layers=(1, 2))
    assert extrapolate([5.0, 7.0], preset) == 5 + 79 * 2
    assert extrapolate([5.0], replace(preset, measured_layers=())) == 5


def test_a_preset_that_is_extrapolated_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], layers=10, measured_layers=(1, 2)))
    status, results = run(tmp_path, "--providers", "frozen_base")
    assert status == 0
    assert results["shape"]["measured_layers"] == [1, 2]
    assert results["rows"][0]["detail"] == "extrapolated to 10 layers from runs with 1 and 2"
    assert "extrapolated to 10 layers from runs with 1 and 2" in capsys.readouterr().out


def test_flops_are_those_that_pytorch_counts() -> None:
    """On a CPU PyTorch counts all matrix products but those of attention."""
    preset = PRESETS["tiny"]
    model, batch = make_model(preset, CPU, 0), make_batch(preset, 0)
    trainee = step_providers.make_trainee("frozen_base", model, preset)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        trainee.loss(batch)
    tokens, width = 2 * preset.segment_tokens, preset.heads * preset.head_dim
    causal_attention = preset.layers * tokens * width * preset.window * 2  # two products, half of the square
    assert step_flops(preset) == 2 * counter.get_total_flops() + 3 * causal_attention


def test_parts_are_exclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 7.0, 20.0, 21.0])
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: next(ticks))
    clock = PartClock(CPU)
    with running(clock):
        with part("outer"), part("inner"):
            pass
        with part("other"):
            pass
    with part("without a clock"):
        pass
    assert clock.seconds() == {"outer": 1.0 + 4.0, "inner": 2.0, "other": 1.0}


def test_the_presets_have_the_shapes_of_their_models() -> None:
    sizes = {name: preset.layers * _layer_weights(preset) for name, preset in PRESETS.items()}
    assert sizes["llama2-7b"] == 6_476_005_376
    assert sizes["mistral-7b"] == 6_979_321_856
    assert sizes["llama3-70b"] == 68_451_041_280
    for name, preset in PRESETS.items():
        assert check_preset(preset).family == preset.family, name
    assert set(PROVIDERS) >= {"reference", "eager", "compiled", "triton", "cuda", "auto"}


def _layer_weights(preset: Any) -> int:
    attention = 2 * preset.hidden * preset.head_dim * (preset.heads + preset.kv_heads)
    return attention + 3 * preset.hidden * preset.ffn
