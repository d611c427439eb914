"""Times of the operations on GPUs: committed measurements, and those of `gakernels calibrate` on this machine.

`<gpu>.json` is written by `python -m benchmarks.rows defaults` from committed result rows; don't edit it by hand. A
GPU without a file uses those of its compute capability.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gakernels.errors import FormatError
from gakernels.ops.gpus import Gpu
from gakernels.ops.measured import calibration

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Measurement:
    """One call of an operation, measured with several backends.

    Attributes:
        gpu: its name.
        operation, dtype, sizes: the call.
        backends: the measured ones. (In tuples: torch.compile can't guard a dictionary that is a constant.)
        forward_ms, backward_ms: the median time of each of them.
        gemm_flops: rate of a large GEMM of that dtype on that GPU, operations per second; 0 if it was not measured.
        copy_bytes: bandwidth of a copy there, bytes per second, counting reads and writes.
        calibrated: whether this machine measured it.
    """

    gpu: str
    operation: str
    dtype: str
    sizes: Mapping[str, int]
    backends: tuple[str, ...]
    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    gemm_flops: float
    copy_bytes: float
    calibrated: bool


def nearest(
    rows: Sequence[Measurement], operation: str, dtype: torch.dtype, sizes: Mapping[str, int], backends: Sequence[str]
) -> tuple[Measurement, float] | None:
    """The most relevant measurement for a call, and its `distance`; None if there is none.

    Measurements with all the backends come first, then those of this machine, then the nearest sizes, then the first.
    """
    best, best_rank = None, None
    for row in rows:
        if row.operation != operation or row.dtype not in _like(dtype):
            continue
        missing = sum(1 for backend in backends if backend not in row.backends)
        if missing == len(backends):
            continue
        rank = missing, not row.calibrated, distance(sizes, row.sizes)
        if best_rank is None or rank < best_rank:
            best, best_rank = row, rank
    return None if best is None or best_rank is None else (best, best_rank[-1])


def distance(sizes: Mapping[str, int], others: Mapping[str, int]) -> float:
    """How different two calls are: the product of the ratios of their sizes, 1 for the same."""
    product = 1.0
    for name, size in sizes.items():
        size, other = max(size, 1), others[name]
        product *= size / max(other, 1) if size > other else max(other, 1) / size
    return product


def _like(dtype: torch.dtype) -> tuple[str, ...]:
    """Dtypes with the same speed: tensor cores multiply both 16-bit types at one rate."""
    name = str(dtype).removeprefix("torch.")
    return ("bfloat16", "float16") if name in ("bfloat16", "float16") else (name,)


@functools.cache
def rows_of(gpu: Gpu) -> tuple[Measurement, ...]:
    """The measurements for a GPU: of this machine, of that GPU, and of others of its capability, in this order.

    Raises:
        FormatError: the record of this machine is damaged.
    """
    record = calibration.read(gpu)
    own = () if record is None else measurements(record, calibrated=True)
    alike = [row for capability, rows in _committed(FOLDER) for row in rows if capability == gpu.capability]
    return own + tuple(sorted(alike, key=lambda row: row.gpu != gpu.name))


@functools.cache
def _committed(folder: Path) -> tuple[tuple[tuple[int, int], tuple[Measurement, ...]], ...]:
    documents = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    try:
        return tuple(
            ((int(document["capability"][0]), int(document["capability"][1])), measurements(document))
            for _, document in documents
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FormatError(f"{folder} must hold measurements of `benchmarks.rows` only, but: {error!r}") from error


def measurements(document: Mapping[str, Any], calibrated: bool = False) -> tuple[Measurement, ...]:
    """The measurements of a file. Raises: KeyError, TypeError: it has none."""
    return tuple(
        Measurement(
            gpu=document["gpu"],
            operation=row["operation"],
            dtype=row["dtype"],
            sizes={str(name): int(size) for name, size in row["sizes"].items()},
            backends=tuple(row["milliseconds"]),
            forward_ms=tuple(float(times[0]) for times in row["milliseconds"].values()),
            backward_ms=tuple(float(times[1]) for times in row["milliseconds"].values()),
            gemm_flops=float(document["gemm_flops"].get(row["dtype"], 0.0)),
            copy_bytes=float(document["copy_bytes"]),
            calibrated=calibrated,
        )
        for row in document["rows"]
    )


def forget() -> None:
    """Read all files again at the next query."""
    rows_of.cache_clear()
    _committed.cache_clear()
