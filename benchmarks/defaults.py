"""What decides between the backends on a GPU: written from committed result rows, never by hand.

    python -m benchmarks.defaults benchmarks/results/nvidia-h200/rows.jsonl

Each case of an operation that was measured forward and backward, correct, with several backends in one run, goes to
`gakernels/ops/measured/<gpu>.json`, with the rates of GEMM and copy there.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.rows import OK, Row, read_rows
from gakernels.errors import InputError
from gakernels.files import write_text
from gakernels.ops import gpus, measured

OPERATIONS = ("context_state", "low_rank_polar", "lowrank_linear")
PROVIDERS = ("eager", "triton", "cuda")
MODES = ("forward", "backward")
SIZES = {"T": "batch", "windows": "batch", "M": "tokens", "d_h": "hidden", "d_r": "state", "r": "rank"}
SIZES |= {"d_in": "in", "d_out": "out"}  # the names in a row's shape, and those of the operations


def documents(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """The file of each GPU. Later rows of the same case and provider stand for earlier ones.

    Raises:
        InputError: the compute capability of a GPU is not known (`gpus.known`).
    """
    found: dict[str, dict[str, Any]] = {}
    cases: dict[tuple[str, ...], dict[tuple[str, str], Row]] = defaultdict(dict)
    for row in rows:
        if row.environment.kind != "gpu":
            continue
        gpu = row.environment.device
        if gpu not in found:
            capability = list(gpus.known(gpu).capability)
            found[gpu] = {"gpu": gpu, "capability": capability, "gemm_flops": {}, "copy_bytes": 0.0, "rows": []}
        if row.kernel == "ceiling" and row.mode == "gemm":
            found[gpu]["gemm_flops"][row.dtype] = row.metrics["flops_per_s"]
        elif row.kernel == "ceiling" and row.mode == "copy":
            found[gpu]["copy_bytes"] = row.metrics["bytes_per_s"]
        elif row.kernel in OPERATIONS:
            cases[gpu, row.kernel, row.shape, row.dtype, row.environment.commit][row.provider, row.mode] = row
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for (gpu, operation, shape, dtype, commit), passes in cases.items():
        times = _times(passes)
        if len(times) > 1:
            newest[gpu, operation, shape, dtype] = _entry(operation, shape, dtype, commit, times)
    for (gpu, *_), entry in newest.items():
        found[gpu]["rows"].append(entry)
    return {gpu: document for gpu, document in found.items() if document["rows"] and document["copy_bytes"]}


def _times(passes: dict[tuple[str, str], Row]) -> dict[str, list[float]]:
    """Median times of forward and backward by provider, of those that were right in both."""
    found = {}
    for provider in PROVIDERS:
        rows = [row for mode in MODES if (row := passes.get((provider, mode))) is not None and row.status == OK]
        if len(rows) == len(MODES):
            found[provider] = [round(row.p50_ms or 0.0, 4) for row in rows]
    return found


def _entry(operation: str, shape: str, dtype: str, commit: str, times: dict[str, list[float]]) -> dict[str, Any]:
    sizes = {SIZES[name]: int(value) for name, value in (part.split("=") for part in shape.split())}
    if operation == "low_rank_polar":
        sizes["power_iterations"] = 1  # the suites measure no other
    return {"operation": operation, "dtype": dtype, "sizes": sizes, "milliseconds": times, "commit": commit}


def main(arguments: list[str] | None = None) -> int:
    """The command: writes one file per GPU and says what it holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path, help="result files (rows.jsonl)")
    parser.add_argument("--folder", type=Path, default=measured.FOLDER, help="where the files go")
    options = parser.parse_args(arguments)
    for path in options.rows:
        if not path.is_file():
            print(f"there are no results at {path}", file=sys.stderr)
            return 2
    try:
        found = documents(row for path in options.rows for row in read_rows(path))
    except InputError as error:
        print(f"defaults: {error}", file=sys.stderr)
        return 2
    for gpu, document in found.items():
        path = options.folder / f"{gpus.slug(gpu)}.json"
        write_text(path, json.dumps(document, indent=1) + "\n")
        for row in document["rows"]:
            print(f"{gpu}: {row['operation']} {row['dtype']} {row['sizes']} {row['milliseconds']}")
    if not found:
        print("no case was measured with several backends that are right; nothing was written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
