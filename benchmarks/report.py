"""Turn the rows of results into docs/results.md: `python -m benchmarks.report`.

Takes the newest row of each case, provider and device. What was not measured on a GPU is said to be not yet run; floors
and memory plans are computed, and say so. The plots need matplotlib (`pip install gakernels[plots]`).
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import operations
from benchmarks.measure import HARDWARE
from benchmarks.presets import PRESETS as STEP_PRESETS
from benchmarks.presets import Preset
from benchmarks.rows import RESULTS, ROOT, TIMED, UNAVAILABLE, Environment, Row, newest, read_rows
from benchmarks.step_memory import generator_numbers, shape_of

NOT_RUN = "**Not yet run** on a GPU: `python -m benchmarks.gpu_suite --plan operations --out DIR` measures it."
GB = 1e9
KERNELS = (
    "context_state",
    "low_rank_polar",
    "lowrank_linear",
    "AdapterGenerator",
    "AdaptedLinear",
    "train_step",
    "contextualisation",
    "decoding",
    "adapter_generation",
)

INTRODUCTION = """# Results

Made by `python -m benchmarks.report` from the rows in `benchmarks/results/`; don't edit. [benchmarks.md](benchmarks.md)
says how the numbers are measured. The results of pretraining are in [pretraining.md](pretraining.md).

Times are medians, with the 20th and 80th percentile in brackets. A case that disagrees with the float64 oracle is
called wrong and has no time. *floor*: computes less than the operation, a lower limit. *other*: computes something else
with the same purpose. *GEMM* and *copy* are the shares of the measured rate of a large matrix product and of a large
copy. *Error* is the largest relative distance to the oracle, over the output and all gradients.
"""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows (default: benchmarks/results)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    options = parser.parse_args(words)
    try:
        rows = newest(read_rows(options.results)) if options.results.is_dir() else []
        plots = [] if options.no_plots else _plots(rows, options.out.parent / "plots")
        options.out.write_text(document(rows, plots), encoding="utf-8")
    except (ValueError, OSError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(rows)} rows, {len(plots)} plots")
    return 0


def _plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    from benchmarks import plots

    return plots.draw(rows, folder)


def document(rows: Sequence[Row], plots: Sequence[Path] = ()) -> str:
    """The whole file."""
    parts = [INTRODUCTION]
    for kind, title in (("gpu", "GPU"), ("cpu", "CPU")):
        parts.append(f"## Measured on a {title}\n")
        groups = by_environment(row for row in rows if row.environment.kind == kind)
        if not groups:
            parts.append((NOT_RUN if kind == "gpu" else "**Not yet run** on a CPU.") + "\n")
        if kind == "gpu":
            parts.append(_missing(rows))
        for group in groups:
            parts.append(section(group))
        parts += [f"![{path.stem}](plots/{path.name})\n" for path in plots if path.stem.startswith(kind)]
    parts += [_floors(), _memory()]
    return "\n".join(parts)


def by_environment(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that share device, versions and commit; the date may differ."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        where = row.environment
        versions = (where.torch, where.triton, where.cuda, where.python)
        groups.setdefault((where.device, where.threads, where.clocks, *versions, where.commit), []).append(row)
    return list(groups.values())


def section(rows: Sequence[Row]) -> str:
    """The tables of one environment."""
    lines = [f"### {heading(rows[0].environment)}\n"]
    lines += [f"- {line}" for line in _ceilings(rows)]
    kernels = dict.fromkeys(row.kernel for row in rows if row.kernel != "ceiling")
    for kernel in kernels:
        own = [row for row in rows if row.kernel == kernel]
        there = sorted(
            (row for row in own if row.status != UNAVAILABLE), key=lambda row: (row.mode != "forward", row.shape)
        )
        lines += ["", f"#### {kernel}\n", *(_steps(there) if kernel == "train_step" else _table(there))]
        reasons = dict.fromkeys(f"{row.provider}: {row.detail}" for row in own if row.status == UNAVAILABLE)
        lines += ["", f"Not available: {'; '.join(reasons)}."] if reasons else []
    return "\n".join(lines) + "\n"


def heading(where: Environment) -> str:
    """Device, versions and commit."""
    device = where.device if where.kind == "gpu" else f"{where.device}, {where.threads} thread(s)"
    clocks = f", {where.clocks}" if where.clocks else ""
    versions = f"torch {where.torch}, Triton {where.triton}, CUDA {where.cuda}, Python {where.python}"
    return f"{device}{clocks}; {versions}; commit {where.commit}"


def _ceilings(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        for name, value in row.metrics.items() if row.kernel == "ceiling" else ():
            unit = "TFLOP/s" if name == "flops_per_s" else "TB/s"
            lines.append(f"measured {row.mode} ({row.dtype}): {value / 1e12:.3g} {unit}")
    return lines


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| mode | shape | dtype | provider | ms | peak MB | GEMM | copy | error | rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = ", ".join(f"{value:.4g} {name.replace('_per_s', '/s')}" for name, value in row.metrics.items())
        cells = [row.mode, row.shape, row.dtype, row.provider, time_text(row), _megabytes(row)]
        cells += [
            _percent(row.gemm_share),
            _percent(row.copy_share),
            "" if row.error is None else f"{row.error:.1e}",
            rate,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _steps(rows: Sequence[Row]) -> list[str]:
    """Training steps: rates, memory, and the ratios to the eager baseline and the dense floor."""
    lines = [
        "| preset | dtype | provider | ms | tokens/s | MFU | peak MB | x reference | x dense_lora |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        get = row.metrics.get
        over = [get(f"over_{name}") or _over(row, name, rows) for name in ("reference", "dense_lora")]
        numbers = [get("segment_tokens_per_s"), get("mfu"), *over]
        texts = ["" if value is None else f"{value:.4g}" for value in numbers]
        cells = [row.shape.removeprefix("preset="), row.dtype, row.provider, time_text(row), texts[0]]
        cells += [_percent(numbers[1]), _megabytes(row), *texts[2:]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _over(row: Row, provider: str, rows: Sequence[Row]) -> float | None:
    """The ratio of the medians, for providers that did not take turns in one run but ran one after the other."""
    same = [
        r for r in rows if (r.case, r.environment.commit, r.provider) == (row.case, row.environment.commit, provider)
    ]
    return row.p50_ms / same[-1].p50_ms if row.p50_ms and same and same[-1].p50_ms and same[-1] != row else None


def time_text(row: Row) -> str:
    """The percentiles, or why there are none."""
    if row.status not in TIMED or row.p50_ms is None:
        return f"{row.status}: {row.detail}".replace("|", "/") if row.detail else row.status
    note = "" if row.status == "ok" else f" *{row.status}*"
    return f"{row.p50_ms:.4g} ({row.p20_ms:.4g}-{row.p80_ms:.4g}){note}"


def _megabytes(row: Row) -> str:
    return "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.4g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _missing(rows: Sequence[Row]) -> str:
    """What no GPU row says yet."""
    measured = {row.kernel for row in rows if row.environment.kind == "gpu" and row.status in TIMED}
    lines = [f"| {kernel} | {'measured' if kernel in measured else 'not yet run'} |" for kernel in KERNELS]
    return "\n".join(["| kernel | on a GPU |", "|---|---|", *lines]) + "\n"


def _floors() -> str:
    """Least times of the operations at the size of Mistral-7B, from counted operations and bytes."""
    names = " | ".join(f"{hardware.name} ms" for hardware in HARDWARE)
    lines = [
        "## Floors, computed\n",
        "No implementation of these operations in bfloat16 (the norm in float32, its bytes alone) takes less: counted",
        "operations over the GEMM rate or least bytes over the bandwidth, whichever is longer. "
        + "; ".join(
            f"{h.name}: {h.bf16_flops / 1e12:g} TFLOP/s, {h.bandwidth / 1e12:g} TB/s ({h.source})" for h in HARDWARE
        )
        + ".\n",
        f"| operation | mode | shape | GFLOP | MB | {names} |",
        "|---|---|---|---|---|" + "---|" * len(HARDWARE),
    ]
    for operation in operations.operations("mistral-7b", torch.device("cpu"), torch.bfloat16):
        for mode, work in (("forward", operation.forward_work), ("backward", operation.backward_work)):
            flops = work.flops if operation.dtype == torch.bfloat16 else 0.0
            floors = (max(flops / h.bf16_flops, work.bytes / h.bandwidth) * 1e3 for h in HARDWARE)
            cells = [operation.name, mode, operation.shape, f"{work.flops / 1e9:.4g}", f"{work.bytes / 1e6:.4g}"]
            lines.append(f"| {' | '.join([*cells, *(f'{floor:.3g}' for floor in floors)])} |")
    return "\n".join(lines) + "\n"


def _memory() -> str:
    """What is resident in a training step on one GPU, and what that leaves for saved tensors."""
    names = " | ".join(f"left on {hardware.name} GB" for hardware in HARDWARE)
    lines = [
        "## Memory plans, computed\n",
        "One GPU: the frozen base in bfloat16; the generators in float32 with gradients and two moments of AdamW. What",
        "is left holds the saved tensors of a segment.\n",
        f"| preset | base GB | generators GB | {names} |",
        "|---|---|---|" + "---|" * len(HARDWARE),
    ]
    for name, preset in STEP_PRESETS.items():
        if preset.dtype != torch.bfloat16:
            continue
        base, generators = resident(preset)
        left = [h.memory_bytes - base - generators for h in HARDWARE]
        texts = [f"{value / GB:.1f}" if value > 0 else "does not fit" for value in left]
        lines.append(f"| {name} | {base / GB:.1f} | {generators / GB:.1f} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def resident(preset: Preset) -> tuple[float, float]:
    """Bytes of the base model (2 a parameter) and of the generators with their optimizer (16 each)."""
    return 2.0 * shape_of(preset).parameters, 16.0 * generator_numbers(preset)


if __name__ == "__main__":
    raise SystemExit(main())
