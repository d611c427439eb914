"""The training-step benchmark as rows: runs `python -m benchmarks.train_step` and reads what it wrote."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import FAILED, FLOOR, OK, ROOT, STATUSES, Environment, Row

PROVIDERS = ("reference", "auto", "trainer", "dense_lora", "frozen_base")
FLOORS = ("dense_lora", "frozen_base")
PERCENTILES = ((20, "p20"), (50, "median"), (80, "p80"))


def command(preset: str, providers: Sequence[str], device: torch.device, file: Path) -> list[str]:
    """The command line of the benchmark."""
    threads = ["--threads", str(torch.get_num_threads())]
    words = ["--preset", preset, "--providers", ",".join(providers), "--device", device.type, "--json", str(file)]
    return [sys.executable, "-m", "benchmarks.train_step", *words, *threads]


def run(preset: str, providers: Sequence[str], environment: Environment, device: torch.device, file: Path) -> list[Row]:
    """Measure a preset with each provider and write the benchmark's own JSON to a file.

    Raises:
        RuntimeError: the benchmark wrote nothing; the message is its last line.
    """
    result = subprocess.run(
        command(preset, providers, device, file), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if not file.is_file():
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise RuntimeError(f"benchmarks.train_step wrote no results: {lines[-1] if lines else 'no message'}")
    return rows(json.loads(file.read_text(encoding="utf-8")), environment)


def rows(report: Mapping[str, Any], environment: Environment) -> list[Row]:
    """The benchmark's report as rows."""
    quantization = report.get("shape", {}).get("quantization")
    preset = report["preset"] + (f" {quantization}" if quantization else "")
    dtype, ratios = str(report.get("shape", {}).get("dtype", "")), report.get("ratios", {})
    return [_row(entry, preset, dtype, ratios, environment) for entry in report["rows"]]


def _row(entry: Mapping[str, Any], preset: str, dtype: str, ratios: Mapping[str, Any], environment: Environment) -> Row:
    names = ("train_step", entry["provider"], "step", f"preset={preset}", dtype)
    if entry.get("step_s_median") is None:
        status = entry.get("status") if entry.get("status") in STATUSES else FAILED
        detail = str(entry.get("detail") or entry.get("error") or "")
        return Row(*names, status=str(status), environment=environment, detail=detail)
    milliseconds = {f"p{percent}_ms": entry.get(f"step_s_{name}", 0.0) * 1e3 for percent, name in PERCENTILES}
    return Row(
        *names,
        status=FLOOR if entry["provider"] in FLOORS else OK,
        environment=environment,
        detail=str(entry.get("detail") or ""),
        samples=int(entry.get("samples") or 0),
        peak_bytes=entry.get("peak_bytes"),
        error=entry.get("error"),
        metrics=_metrics(entry) | _ratios(entry["provider"], ratios),
        **milliseconds,
    )


def _ratios(provider: str, ratios: Mapping[str, Any]) -> dict[str, float]:
    """Time over that of the baseline and of the dense floor, paired within turns."""
    against = {name: ratios.get(f"{provider}/{name}") for name in ("reference", "dense_lora")}
    return {f"over_{name}": float(found["median"]) for name, found in against.items() if found}


def _metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    """Rates and the time of each part; entries of a dictionary get its name in front."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        if name.startswith("step_s_") or name in ("peak_bytes", "samples", "error"):
            continue
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, number in inner:
            if isinstance(number, int | float):
                found[f"{name}.{key}" if key else name] = float(number)
    return found
