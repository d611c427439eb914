"""One command for a GPU machine: `python -m benchmarks.gpu_suite --plan check --out DIR`.

A plan is a list of stages, the most important first, each with a limit and in a process of its own. Results are written
as they come, to DIR/rows.jsonl, DIR/rows.csv, DIR/log.txt and, for what has no rows, DIR/*.json: a run that is cut off
keeps what was finished, and the same command goes on behind it. Ends with a short table, and with status 1 unless every
stage was done or had nothing to do. `--rehearse` runs a plan to its end on a CPU, at tiny sizes.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import HARDWARE
from benchmarks.plans import PLANS
from benchmarks.rows import BAD_STATUSES, TIMED, UNAVAILABLE, Row, commit, newest, read_rows
from benchmarks.stages import DONE, SKIPPED, Result, Run, Stage, run_stages

PATIENCE = 10  # times the limits for a rehearsal: a CPU may be slow
RATES = ("segment_tokens_per_s", "tokens_per_s", "users_per_s")


def main(words: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(words)
    plan = PLANS[options.plan]
    try:
        stages, minutes = choose(plan.stages, options.only), plan.minutes
        if options.rehearse:
            stages, minutes = [replace(s, seconds=PATIENCE * s.seconds) for s in stages], PATIENCE * minutes
        run = Run(options.out.resolve(), options.rehearse)
        run.folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 2
    where = "rehearsed on the CPU" if run.rehearsal else f"{minutes:g} minutes"
    print(f"plan {options.plan} ({plan.what}), {where}, commit {commit()}")
    print(f"stages: {', '.join(stage.name for stage in stages)}", flush=True)
    results = run_stages(stages, run, minutes * 60)
    print("\n" + summary(run, results))
    return int(any(result.status not in (DONE, SKIPPED) for result in results.values()))


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:11} {plan.minutes:g} minutes: {plan.what}" for name, plan in PLANS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        epilog="plans:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", required=True, choices=PLANS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default="", help="comma-separated stages of the plan (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    return parser


def choose(stages: Sequence[Stage], only: str) -> list[Stage]:
    """The stages to run, in their order. Raises: ValueError: the plan has no stage of a name."""
    wanted = [name for name in only.split(",") if name]
    unknown = [name for name in wanted if name not in {stage.name for stage in stages}]
    if unknown:
        names = ", ".join(stage.name for stage in stages)
        raise ValueError(f"--only must name stages of the plan ({names}), but has {', '.join(unknown)}")
    return [stage for stage in stages if not wanted or stage.name in wanted]


def summary(run: Run, results: dict[str, Result]) -> str:
    """The short table at the end: stages, then the newest row of each case and provider."""
    lines = [f"{'stage':26} {'status':8} {'s':>6}"]
    lines += [f"{name:26} {r.status:8} {r.seconds:6.1f} {r.detail}".rstrip() for name, r in results.items()]
    if not run.rows.is_file():
        return "\n".join([*lines, "", "nothing was measured"])
    rows = [row for row in newest(read_rows(run.rows)) if row.kernel != "ceiling"]
    return "\n".join([*lines, "", *table(rows), *shares(rows), "", f"rows: {run.rows}"])


def table(rows: Iterable[Row]) -> list[str]:
    """One line for each case that has a time or went wrong, with the floors of an H200 and an H100 beside it.

    A training step that could not run says why, too.
    """
    floors = " ".join(f"{hardware.name:>8}" for hardware in HARDWARE)
    lines = [f"{'case':58} {'provider':12} {'p50 ms':>9} {'gemm':>5} {'copy':>5} {floors} {'a second':>9}"]
    for row in rows:
        if row.status == UNAVAILABLE and row.kernel != "train_step":
            continue
        case = f"{row.kernel} {row.mode} {row.shape} {row.dtype}"
        time = f"{row.p50_ms:9.4g}" if row.status in TIMED and row.p50_ms is not None else f"{row.status:>9.9}"
        parts = " ".join(f"{share:5.0%}" if share else " " * 5 for share in (row.gemm_share, row.copy_share))
        lowest = " ".join(f"{value:8.3g}" if value else " " * 8 for value in floor_ms(row))
        rate = next((f"{row.metrics[name]:9.0f}" for name in RATES if name in row.metrics), "")
        note = f" {row.detail}" if row.status in (*BAD_STATUSES, UNAVAILABLE) else ""
        lines.append(f"{case:58.58} {row.provider:12.12} {time} {parts} {lowest} {rate}{note}".rstrip())
    return lines


def floor_ms(row: Row) -> list[float | None]:
    """The least milliseconds that the counted operations and bytes take on each kind of GPU: bf16 rate, 16-bit only."""
    if row.flops is None or row.bytes is None:
        return [None for _ in HARDWARE]
    flops = row.flops if row.dtype in ("bfloat16", "float16") else 0.0
    return [max(flops / h.bf16_flops, row.bytes / h.bandwidth) * 1e3 for h in HARDWARE]


def shares(rows: Sequence[Row]) -> list[str]:
    """How fast contexts are read, as a share of the base model's own prefill of the same chunks."""
    base = {row.case: row.p50_ms for row in rows if row.provider == "base_chunks"}
    lines = []
    for row in rows:
        if (row.kernel, row.provider) == ("contextualisation", "auto") and row.p50_ms and base.get(row.case):
            lines.append(f"{row.shape.split()[0]}: {base[row.case] / row.p50_ms:.2f} of the base model's rate")  # type: ignore[operator]
    return ["", *lines] if lines else []


if __name__ == "__main__":
    raise SystemExit(main())
