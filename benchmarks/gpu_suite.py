"""One command for a GPU machine: `python -m benchmarks.gpu_suite --out DIR`.

Builds the CUDA sources, runs the GPU tests, and measures operations, modules, a training step and inference, in stages
of which each runs in a process of its own. Rows are written as they are measured, to DIR/rows.jsonl and DIR/rows.csv;
the same command again goes on where it was cut off. Ends with a short table, and with status 1 unless every chosen
stage was done or had nothing to do.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import operations, stages, worker
from benchmarks.measure import HARDWARE, dtype_name
from benchmarks.rows import BAD_STATUSES, TIMED, UNAVAILABLE, Row, commit, newest, read_rows
from benchmarks.stages import DONE, NO_TIME, SKIPPED, STAGES, Result, Stage
from benchmarks.worker import Settings


def main(words: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(words)
    try:
        chosen = choose(options.only, options.skip)
        settings = _settings(options)
        settings.folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 2
    print(f"{settings.device.type}, preset {settings.preset}, {dtype_name(settings.dtype)}, commit {commit()}")
    print(f"stages: {', '.join(stage.name for stage in chosen)}; {options.budget_minutes:g} minutes", flush=True)
    results = run_stages(chosen, settings, options.budget_minutes * 60, options.again)
    print("\n" + summary(settings, results))
    return int(any(result.status not in (DONE, SKIPPED) for result in results.values()))


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {s.name:16} {s.what}{'' if s.by_default else ' (only when named)'}" for s in STAGES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        epilog="stages:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default="", help="comma-separated stages, or `all`")
    parser.add_argument("--skip", default="", help="comma-separated stages")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="end after this long (default: %(default)g)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=tuple(operations.PRESETS), help="default: mistral-7b, on a CPU cpu")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32"
    )
    parser.add_argument("--providers", help="comma-separated (default: all that the stage has)")
    parser.add_argument("--seconds", type=float, default=0.4, help="of samples per case (default: %(default)g)")
    parser.add_argument("--again", action="store_true", help="run stages that an earlier run has done")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    if not options.budget_minutes > 0 or not options.seconds > 0:
        raise ValueError("--budget-minutes and --seconds must be above 0")
    on_gpu = options.device == "cuda"
    return Settings(
        stage="",
        folder=options.out.resolve(),
        device=torch.device(options.device),
        dtype=getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32")),
        preset=options.preset or ("mistral-7b" if on_gpu else "cpu"),
        seconds=options.seconds,
        providers=tuple(options.providers.split(",")) if options.providers else None,
        since=0,
    )


def choose(only: str, skip: str) -> list[Stage]:
    """The stages to run, in their order. Raises: ValueError: there is no stage of a name, or none is left."""
    wanted, left_out = ({name for name in text.split(",") if name} for text in (only, skip))
    unknown = sorted((wanted | left_out) - {*stages.NAMES, "all"})
    if unknown:
        raise ValueError(f"no stage is called {', '.join(unknown)}; there are {', '.join(stages.NAMES)}")
    chosen = [
        stage
        for stage in STAGES
        if (stage.name in wanted or "all" in wanted or (not wanted and stage.by_default)) and stage.name not in left_out
    ]
    if not chosen:
        raise ValueError("no stage is left to run")
    return chosen


def run_stages(chosen: Sequence[Stage], settings: Settings, seconds: float, again: bool) -> dict[str, Result]:
    """Run the stages one after the other; whatever happens to one, the others go on while there is time."""
    run = {
        "commit": commit(),
        "device": settings.device.type,
        "preset": settings.preset,
        "dtype": dtype_name(settings.dtype),
    }
    deadline = time.monotonic() + seconds
    results: dict[str, Result] = {}
    for stage in chosen:
        print(f"\n== {stage.name}: {stage.what}", flush=True)
        before = stages.read_results(settings.folder).get(stage.name, {})
        if not again and before.get("status") == DONE and run.items() <= before.items():
            results[stage.name] = Result(DONE, "in an earlier run")
        elif time.monotonic() >= deadline:
            results[stage.name] = Result(NO_TIME, "the time was over before it began")
        else:
            counted = Settings(**{**vars(settings), "since": _count(settings.folder)})
            results[stage.name] = stages.run_stage(stage, counted, deadline - time.monotonic())
            stages.write_result(settings.folder, stage.name, results[stage.name], run)
        print(f"{stage.name}: {results[stage.name].status} {results[stage.name].detail}".rstrip(), flush=True)
    return results


def _count(folder: Path) -> int:
    file = worker.rows_file(folder)
    return len(read_rows(file)) if file.is_file() else 0


def summary(settings: Settings, results: dict[str, Result]) -> str:
    """The short table at the end: stages, then the newest row of each case and provider."""
    lines = [f"{'stage':16} {'status':8} {'s':>6}"]
    lines += [
        f"{name:16} {result.status:8} {result.seconds:6.1f} {result.detail}".rstrip()
        for name, result in results.items()
    ]
    file = worker.rows_file(settings.folder)
    if not file.is_file():
        return "\n".join([*lines, "", "nothing was measured"])
    rows = [row for row in newest(read_rows(file)) if row.kernel != "ceiling"]
    return "\n".join([*lines, "", *table(rows), "", f"rows: {file}"])


def table(rows: Iterable[Row]) -> list[str]:
    """One line for each case that has a time or went wrong, and the floors of an H200 and an H100 beside it."""
    floors = [hardware.name for hardware in HARDWARE]
    lines = [
        f"{'case':58} {'provider':12} {'p50 ms':>9} {'gemm':>5} {'copy':>5} " + " ".join(f"{n:>8}" for n in floors)
    ]
    for row in rows:
        if row.status == UNAVAILABLE:
            continue
        case = f"{row.kernel} {row.mode} {row.shape} {row.dtype}"
        time = f"{row.p50_ms:9.4g}" if row.status in TIMED and row.p50_ms is not None else f"{row.status:>9.9}"
        shares = " ".join(f"{share:5.0%}" if share else " " * 5 for share in (row.gemm_share, row.copy_share))
        lowest = " ".join(f"{value:8.3g}" if value else " " * 8 for value in floor_ms(row))
        note = f" {row.detail}" if row.status in BAD_STATUSES else ""
        lines.append(f"{case:58.58} {row.provider:12.12} {time} {shares} {lowest}{note}".rstrip())
    return lines


def floor_ms(row: Row) -> list[float | None]:
    """The least milliseconds that the counted operations and bytes take on each kind of GPU: bf16 rate, 16-bit only."""
    if row.flops is None or row.bytes is None:
        return [None for _ in HARDWARE]
    flops = row.flops if row.dtype in ("bfloat16", "float16") else 0.0
    return [max(flops / h.bf16_flops, row.bytes / h.bandwidth) * 1e3 for h in HARDWARE]


if __name__ == "__main__":
    raise SystemExit(main())
