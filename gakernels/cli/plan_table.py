"""Plans as --dry-run prints them."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gakernels.cost.memory import Recomputation
from gakernels.data import BadRecords
from gakernels.training.plan import FinetuningPlan, PretrainingPlan, RunPlan
from gakernels.training.run_memory import RESERVED

USUAL_TFLOPS = (100.0, 300.0, 600.0)


def print_pretraining_plan(plan: PretrainingPlan, tflops: float | None, segments: int | None) -> None:
    """Print the plan of a pretraining run.

    Args:
        plan: the plan.
        tflops: 10^12 operations per second of one process; None for a few usual rates.
        segments: number of segments of the data, if known.
    """
    _print_table(f"Plan for {plan.name}", _size_rows(plan, segments))
    _print_table("Operations of a step", _flops_rows(plan))
    _print_memory(plan)
    _print_table("Time, without evaluations", _time_rows(plan, _rates(tflops)))


def print_finetuning_plan(plan: FinetuningPlan, tflops: float | None) -> None:
    """Print the plan of a tuning run, and why the run would stop, if it would; `tflops` as above."""
    data, load = plan.data, plan.load
    rows = [
        *_parameter_rows(plan),
        ("contexts to train on", f"{data.contexts:,}, with {data.conversations:,} conversations"),
        ("contexts held out", f"{len(data.held_out):,}"),
        ("records left out", _counts(data.skipped)),
        ("conversations cut to their last exchanges", _counts(data.shortened)),
        ("steps", f"{plan.steps:,} of {plan.contexts} contexts: {plan.rounds:,.2f} rounds"),
        ("tokens in a step", f"{load.tokens:,.0f} on average, {load.padding:.1%} of the positions are padding"),
        ("passes in a step", f"{load.batches:,.1f} on each of {plan.processes} process(es)"),
        ("operations of a step, at most", _operations(plan.operations)),
        *[
            (f"time at {rate:,g} TFLOP/s per process, at most", _duration(plan.seconds(rate)))
            for rate in _rates(tflops)
        ],
    ]
    _print_table(f"Plan for {plan.name}", rows)
    _print_memory(plan)
    if data.refusal is not None:
        Console().print(f"A run stops: {data.refusal}", markup=False)


def _print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _parameter_rows(plan: RunPlan) -> list[tuple[str, str]]:
    return [
        ("parameters of the base, frozen", f"{plan.base_parameters:,}"),
        ("parameters of the generators, trained", f"{plan.generator_parameters:,}"),
    ]


def _rates(tflops: float | None) -> Sequence[float]:
    return [tflops] if tflops else USUAL_TFLOPS


def _counts(records: BadRecords) -> str:
    return "\n".join(f"{count:,} x {kind}" for kind, count in records.counts.items()) or "none"


def _size_rows(plan: PretrainingPlan, segments: int | None) -> list[tuple[str, str]]:
    seen = plan.steps * plan.segments
    epochs = "not known before the data is tokenised" if segments is None else f"{seen / segments:,.2f}"
    return [
        *_parameter_rows(plan),
        ("steps", f"{plan.steps:,}"),
        ("segments in a step", f"{plan.segments:,} on {plan.processes} process(es), {plan.segments_at_once} at once"),
        ("tokens in a segment", f"{plan.segment_tokens:,}, as {plan.windows} windows"),
        ("tokens in a step", f"{plan.segments * plan.segment_tokens:,}"),
        ("tokens of the run", f"{plan.tokens:,}"),
        ("epochs", epochs),
    ]


def _flops_rows(plan: PretrainingPlan) -> list[tuple[str, str]]:
    forward, backward = plan.flops.forward.to_dict(), plan.flops.backward.to_dict()
    names = {"linear": "linear layers", "attention": "attention", "head": "logits", "adapter": "low-rank products"}
    names |= {"generator": "generators", "total": "all"}
    rows = [
        (label, f"{_operations(forward[name])} forward, {_operations(backward[name])} backward")
        for name, label in names.items()
    ]
    return [*rows, ("the run", _operations(plan.operations * plan.steps))]


def _print_memory(plan: RunPlan) -> None:
    rows = [
        *[(name, f"{size / 1e9:,.3f} GB") for name, size in plan.memory.parts.items()],
        ("all", f"{plan.memory.total / 1e9:,.3f} GB"),
        ("layers recomputing gate and up", str(len(plan.memory.recomputed.gated))),
        ("layers recomputed as a whole", str(len(plan.memory.recomputed.whole))),
        *[(f"fits a GPU of {size} GB", _fit(size, recomputed)) for size, recomputed in plan.fits.items()],
    ]
    _print_table(f"Memory of a process: {plan.memory.moment}", rows)


def _fit(size: int, recomputed: Recomputation | None) -> str:
    if recomputed is None:
        return "no"
    layers = len(recomputed.gated) + len(recomputed.whole)
    return f"with memory_budget {size - RESERVED / 1e9:g}GB (layers: {layers})" if layers else "yes"


def _time_rows(plan: PretrainingPlan, rates: Sequence[float]) -> list[tuple[str, str]]:
    return [
        (
            f"at {rate:,g} TFLOP/s per process",
            f"{_duration(plan.seconds(rate))}, {plan.tokens_per_second(rate):,.0f} tokens/s",
        )
        for rate in rates
    ]


def _operations(count: float) -> str:
    """A number of floating-point operations, for reading."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G")):
        if count >= 10**power:
            return f"{count / 10**power:,.2f} {prefix}FLOP"
    return f"{count / 1e6:,.2f} MFLOP"


def _duration(seconds: float) -> str:
    """A duration, for reading."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:,.1f} minutes" if seconds >= 120 else f"{seconds:,.1f} seconds"
