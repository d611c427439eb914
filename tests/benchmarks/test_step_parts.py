"""The parts of a step and their rivals compute the same, and the variants of the step are right."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import modules, train_step
from benchmarks.cases import Session, run_case
from benchmarks.measure import Effort
from benchmarks.presets import PRESETS
from benchmarks.rows import OK, UNAVAILABLE, environment
from benchmarks.step_providers import TOLERANCE, provider_error

CPU = torch.device("cpu")
THERE = {
    "liger": importlib.util.find_spec("liger_kernel") is not None,
    "torch_chunked": hasattr(torch.nn, "LinearCrossEntropyOptions"),  # not in torch 2.11
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_who_run_here_agree(dtype: torch.dtype) -> None:
    session = Session(CPU, environment(CPU), None, Effort(warmup=0, seconds=0.0, least=1))
    for case in modules.part_cases("tiny", CPU, dtype):
        for provider in case.providers:
            if provider == "compiled":
                continue  # takes long; the same function as `transformers`
            row = run_case(case, provider, session).row
            assert row.status == (OK if THERE.get(provider, True) else UNAVAILABLE), (str(case), provider, row.detail)


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="preset must be one of tiny, cpu, mistral-7b, but it is 'huge'"):
        modules.part_cases("huge", CPU, torch.float32)


@pytest.mark.parametrize("name", ["overlap", "recompute"])
def test_the_variants_of_the_step_are_right(name: str) -> None:
    assert provider_error(name, PRESETS["tiny"], CPU, 0) <= TOLERANCE


def test_a_row_has_the_estimate_beside_the_measured_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train_step.measure_ceilings
    monkeypatch.setattr(train_step, "measure_ceilings", lambda *arguments: plain(*arguments, small=True))
    file = tmp_path / "results.json"
    words = ["--preset", "tiny", "--device", "cpu", "--steps", "1", "--providers", "auto,recompute,frozen_base"]
    assert train_step.main([*words, "--json", str(file)]) == 0
    rows = {row["provider"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert "estimated_bytes" not in rows["frozen_base"]["metrics"]
    for name in ("auto", "recompute"):
        assert rows[name]["metrics"]["estimated_bytes"] == pytest.approx(rows[name]["peak_bytes"], rel=0.15)
    assert rows["recompute"]["peak_bytes"] < rows["auto"]["peak_bytes"]
