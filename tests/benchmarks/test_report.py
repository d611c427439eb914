"""docs/results.md: every number names its device, versions and commit, and nothing is said of what was not run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.presets import PRESETS, check_preset, make_model
from benchmarks.rows import Environment, Row, RowWriter

MakeRow = Callable[..., Row]


@pytest.fixture
def gpu(where: Environment) -> Environment:
    versions = {"triton": "3.6.0", "cuda": "13.0", "commit": "feedfeedfeed"}
    return replace(where, device="NVIDIA H200", kind="gpu", clocks="1980 MHz SM, 3201 MHz memory", **versions)


def test_without_rows_everything_is_not_yet_run() -> None:
    text = report.document([])
    gpu_part, cpu_part = text.split("## Measured on a CPU")
    assert "Not yet run" in gpu_part
    assert all(f"| {kernel} | not yet run |" in gpu_part for kernel in report.KERNELS)
    assert "Not yet run" in cpu_part
    assert "(pretraining.md)" in text
    assert "Floors, computed" in text


def test_a_measured_kernel_on_a_gpu(make_row: MakeRow, gpu: Environment) -> None:
    text = report.document([make_row(environment=gpu, kernel="low_rank_polar"), make_row()])
    gpu_part = text.split("## Measured on a CPU")[0]
    heading = "NVIDIA H200, 1980 MHz SM, 3201 MHz memory; torch 2.13.0, Triton 3.6.0, CUDA 13.0, Python 3.11.7"
    assert f"### {heading}; commit feedfeedfeed" in gpu_part
    assert "| low_rank_polar | measured |" in gpu_part
    assert "| context_state | not yet run |" in gpu_part
    assert report.NOT_RUN not in text


def test_statuses(make_row: MakeRow) -> None:
    rows = [
        make_row(2.0),
        make_row(1.0, provider="base_gemm", status="floor"),
        make_row(None, provider="triton", status="not available", detail="there is none"),
        make_row(None, provider="cuda", status="wrong", detail="0.5 from the oracle", error=0.5),
    ]
    text = report.section(rows)
    assert "| eager | 2 (1.9-2.1) |" in text
    assert "| base_gemm | 1 (0.95-1.05) *floor* |" in text
    assert "| cuda | wrong: 0.5 from the oracle |" in text
    assert "Not available: triton: there is none." in text


def test_commits_are_kept_apart(make_row: MakeRow, where: Environment) -> None:
    rows = [make_row(), make_row(provider="x", environment=replace(where, commit="other"))]
    assert len(report.by_environment(rows)) == 2
    later = make_row(provider="x", environment=replace(where, date="2027-01-01T00:00:00Z"))
    assert len(report.by_environment([make_row(), later])) == 1


def test_training_steps(make_row: MakeRow) -> None:
    metrics = {"segment_tokens_per_s": 1234.5, "mfu": 0.25, "over_dense_lora": 1.05}
    text = report.section([make_row(kernel="train_step", mode="step", shape="preset=tiny", metrics=metrics)])
    assert "| tiny | float32 | eager | 2 (1.9-2.1) | 1234 | 25.0% |  |  | 1.05 |" in text


@pytest.mark.parametrize("name", ["mistral-7b", "qwen3-8b", "smollm2-135m"])
def test_the_memory_plan_counts_the_parameters(name: str) -> None:
    preset = check_preset(PRESETS[name])
    model = make_model(preset, torch.device("cpu"), seed=0)
    base, generators = report.resident(preset)
    assert base == 2 * sum(p.numel() for p in model.base.parameters())
    assert generators == 16 * sum(p.numel() for p in model.generators.parameters())


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
    first = {name: (out.parent / "plots" / name).read_bytes() for name in names}
    assert report.main(words) == 0
    assert first == {name: (out.parent / "plots" / name).read_bytes() for name in names}
    writer.path.write_text("{}\n", encoding="utf-8")
    capsys.readouterr()
    assert report.main(words) == 2
    assert "rows.jsonl, line 1, is not a row" in capsys.readouterr().err
