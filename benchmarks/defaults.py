"""Which kernels become the default on a GPU: written from committed result rows, never by hand.

    python -m benchmarks.defaults benchmarks/results/nvidia-h200/rows.jsonl

A kernel becomes the default of an operation for the sizes of a row where it was correct, forward and backward, and its
slow repetitions (80th percentile, both passes together) were faster than the quick ones (20th) of the eager form, on
that GPU and commit. The rules go to `gakernels/ops/measured/<gpu>.json`.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.rows import OK, Row, read_rows
from gakernels.files import write_text
from gakernels.ops import measured

KERNELS = ("triton", "cuda")
MODES = ("forward", "backward")
SIZES = {"T": "batch", "windows": "batch", "M": "tokens", "d_h": "hidden", "d_r": "state", "r": "rank"}
SIZES |= {"d_in": "in", "d_out": "out"}  # the names in a row's shape, and those of the operations


def rules(rows: Iterable[Row]) -> dict[str, list[dict[str, Any]]]:
    """The rules by GPU. Later rows of the same case and provider stand for earlier ones."""
    newest: dict[tuple[str, ...], dict[tuple[str, str], Row]] = defaultdict(dict)
    for row in rows:
        if row.kernel in ("context_state", "low_rank_polar", "lowrank_linear") and row.environment.kind == "gpu":
            case = row.environment.device, row.kernel, row.shape, row.dtype, row.environment.commit
            newest[case][row.provider, row.mode] = row
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (gpu, operation, shape, dtype, commit), measurements in newest.items():
        backend = _fastest(measurements)
        if backend is None:
            continue
        sizes = {SIZES[name]: int(value) for name, value in (part.split("=") for part in shape.split())}
        if operation == "low_rank_polar":
            sizes["power_iterations"] = 1  # the suites measure no other
        rule = {"operation": operation, "dtype": dtype, "sizes": sizes, "backend": backend, "commit": commit}
        found[gpu] = [
            r for r in found[gpu] if {**r, "backend": "", "commit": ""} != {**rule, "backend": "", "commit": ""}
        ]
        found[gpu].append(rule)
    return dict(found)


def _fastest(measurements: dict[tuple[str, str], Row]) -> str | None:
    """The quickest kernel that is clearly faster than the eager form, or None."""

    def total(provider: str, percentile: str) -> float | None:
        passes = [measurements.get((provider, mode)) for mode in MODES]
        times = [getattr(row, percentile) for row in passes if row is not None and row.status == OK]
        return sum(times) if len(times) == len(MODES) else None

    limit = total("eager", "p20_ms")
    slow = {kernel: total(kernel, "p80_ms") for kernel in KERNELS}
    faster = [name for name, time in slow.items() if limit is not None and time is not None and time < limit]
    return min(faster, key=lambda name: total(name, "p50_ms") or 0.0, default=None)


def main(arguments: list[str] | None = None) -> int:
    """The command: writes one file per GPU and says what it holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path, help="result files (rows.jsonl)")
    parser.add_argument("--folder", type=Path, default=measured.FOLDER, help="where the rules go")
    options = parser.parse_args(arguments)
    for path in options.rows:
        if not path.is_file():
            print(f"there are no results at {path}", file=sys.stderr)
            return 2
    found = rules(row for path in options.rows for row in read_rows(path))
    for gpu, entries in found.items():
        path = options.folder / f"{measured.slug(gpu)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"gpu": gpu, "rules": entries}, indent=1) + "\n")
        for rule in entries:
            print(f"{gpu}: {rule['backend']} for {rule['operation']} {rule['dtype']} {rule['sizes']}")
    if not found:
        print("no row shows a kernel that is correct and clearly faster than the eager form; nothing was written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
