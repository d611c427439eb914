"""The part of a stage that runs in a process of its own: measures cases and writes a row for each as it goes.

A broken GPU context takes the process down with it; it ends then with status RESTART, and the suite starts another,
which leaves out what was tried already.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import inference, modules, operations, providers, step_parts, training
from benchmarks.cases import Case, Session, first_line, run_case
from benchmarks.measure import Ceilings, Effort, dtype_name, measure_ceilings
from benchmarks.rows import (
    BAD_STATUSES,
    FAILED,
    OK,
    TIMED,
    Environment,
    Row,
    RowWriter,
    environment,
    read_rows,
)
from benchmarks.step_variants import VARIANTS

RESTART = 75
BROKEN = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")
TRAINING_PRESETS = {"cpu": "cpu-mid"}  # others have the same name


@dataclass(frozen=True)
class Settings:
    """What a worker is told.

    Attributes:
        stage: its name.
        folder: of the results.
        device, dtype, preset: what to measure.
        seconds: of samples per case.
        providers: names, or None for those of the stage.
        since: number of rows in the file when the stage began; what stands behind them was tried in this stage.
    """

    stage: str
    folder: Path
    device: torch.device
    dtype: torch.dtype
    preset: str
    seconds: float
    providers: tuple[str, ...] | None
    since: int


def rows_file(folder: Path) -> Path:
    return folder / "rows.jsonl"


def run(settings: Settings) -> int:
    """Run a stage; returns the exit status: 0, 1 if a case is wrong or failed, or RESTART."""
    return STAGES[settings.stage](settings)


def ceilings_file(folder: Path, device: torch.device) -> Path:
    return folder / f"ceilings-{device.type}.json"


def _ceilings(settings: Settings) -> Ceilings:
    """Measured once for a folder and device."""
    file = ceilings_file(settings.folder, settings.device)
    if file.is_file():
        return Ceilings(**json.loads(file.read_text(encoding="utf-8")))
    dtypes = sorted({settings.dtype, torch.float32}, key=str)
    ceilings = measure_ceilings(settings.device, dtypes, small=settings.preset == "tiny")
    file.write_text(json.dumps(asdict(ceilings)), encoding="utf-8")
    return ceilings


def _device(settings: Settings) -> int:
    """The ceilings, as rows and for the shares of all other rows."""
    ceilings_file(settings.folder, settings.device).unlink(missing_ok=True)
    ceilings, where = _ceilings(settings), environment(settings.device)
    writer = RowWriter(rows_file(settings.folder))
    for dtype, rate in ceilings.gemm_flops.items():
        _write(writer, Row("ceiling", "torch", "gemm", "", dtype, OK, where, metrics={"flops_per_s": rate}))
    copy = {"bytes_per_s": ceilings.copy_bandwidth}
    _write(writer, Row("ceiling", "torch", "copy", "", "float32", OK, where, metrics=copy))
    return 0


def _cases(make: Callable[[Settings], Sequence[Case]]) -> Callable[[Settings], int]:
    """A stage that measures cases."""

    def run_stage(settings: Settings) -> int:
        where = environment(settings.device)
        effort = Effort(warmup=2, seconds=settings.seconds, least=3)
        session = Session(settings.device, where, _ceilings(settings), effort)
        writer = RowWriter(rows_file(settings.folder))
        tried = _tried(settings, where)
        status = 0
        for case in make(settings):
            for provider in case.providers:
                if (*case_key(case), provider) in tried:
                    continue
                row = run_case(case, provider, session).row
                _write(writer, row)
                status = max(status, int(row.status in BAD_STATUSES))
                if any(sign in row.detail for sign in BROKEN):
                    return RESTART
        return status

    return run_stage


def case_key(case: Case) -> tuple[str, str, str, str]:
    return case.kernel, case.mode, case.shape, case.dtype


def _tried(settings: Settings, where: Environment) -> set[tuple[str, ...]]:
    """What has a time from this commit and device, and whatever this stage has tried before it was started again."""
    file = rows_file(settings.folder)
    rows = read_rows(file) if file.is_file() else []
    same = [
        row
        for number, row in enumerate(rows)
        if number >= settings.since
        or (row.status in TIMED and (row.environment.commit, row.environment.device) == (where.commit, where.device))
    ]
    return {(*row.case, row.provider) for row in same}


def _training(settings: Settings, names: Sequence[str] = training.PROVIDERS, quantization: str | None = None) -> int:
    """A stage of training steps with the named providers."""
    where = environment(settings.device)
    writer = RowWriter(rows_file(settings.folder))
    preset = TRAINING_PRESETS.get(settings.preset, settings.preset)
    stage = "" if settings.stage == "training" else f"-{settings.stage}"
    file = settings.folder / f"train_step-{preset}{stage}.json"
    file.unlink(missing_ok=True)
    try:
        rows = training.run(preset, settings.providers or names, where, settings.device, file, quantization)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        rows = [Row("train_step", "all", "step", f"preset={preset}", "", FAILED, where, detail=first_line(error))]
    for row in rows:
        _write(writer, row)
    return int(any(row.status in BAD_STATUSES for row in rows))


def _write(writer: RowWriter, row: Row) -> None:
    """To the files, and one line to the terminal."""
    writer.write(row)
    time = "" if row.p50_ms is None else f"{row.p50_ms:.4g} ms"
    metrics = "" if row.p50_ms is not None else ", ".join(f"{name} {value:.4g}" for name, value in row.metrics.items())
    line = (
        f"  {row.kernel} {row.mode} {row.shape} {row.dtype} {row.provider}: {row.status} {time}{metrics} {row.detail}"
    )
    print(line.rstrip(), flush=True)


def _without_compiled(settings: Settings) -> Sequence[Case]:
    every = {name for names in providers.NAMES.values() for name in names} - {"compiled"}
    return operations.cases(settings.preset, settings.device, settings.dtype, settings.providers or sorted(every))


STAGES: dict[str, Callable[[Settings], int]] = {
    "device": _device,
    "operations": _cases(_without_compiled),
    "many_states": _cases(lambda s: operations.many_states(s.preset, s.device, s.dtype, s.providers)),
    "modules": _cases(lambda s: modules.cases(s.preset, s.device, s.dtype, s.providers)),
    "inference": _cases(lambda s: inference.cases(s.preset, s.device, s.dtype, s.providers)),
    "compile": _cases(lambda s: operations.cases(s.preset, s.device, s.dtype, ["compiled"])),
    "flash_attention": _cases(
        lambda s: inference.cases(s.preset, s.device, s.dtype, s.providers, attention="flash_attention_2")
    ),
    "training": _training,
    "step_variants": functools.partial(_training, names=("auto", "trainer", *VARIANTS)),
    "step_fp8": functools.partial(_training, names=("auto", "overlap_compiled"), quantization="fp8"),
    "step_parts": _cases(lambda s: step_parts.cases(s.preset, s.device, s.dtype, s.providers)),
}


def main(words: Sequence[str]) -> int:
    """Entry of the process: the settings as one JSON object."""
    values = json.loads(words[0])
    settings = Settings(
        stage=values["stage"],
        folder=Path(values["folder"]),
        device=torch.device(values["device"]),
        dtype=getattr(torch, values["dtype"]),
        preset=values["preset"],
        seconds=values["seconds"],
        providers=tuple(values["providers"]) if values["providers"] else None,
        since=values["since"],
    )
    return run(settings)


def to_words(settings: Settings) -> list[str]:
    """The argument of `main`."""
    values = {**vars(settings), "folder": str(settings.folder), "device": str(settings.device)}
    return [json.dumps({**values, "dtype": dtype_name(settings.dtype)})]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
