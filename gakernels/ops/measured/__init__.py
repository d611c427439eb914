"""Which kernel measured faster than the eager form, by GPU, operation, dtype and sizes: `<gpu>.json`.

Each file is written by `python -m benchmarks.defaults` from committed result rows; no one edits it by hand. A GPU
without a file has no measurement.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
COUNTS = ("batch", "tokens")  # sizes that may be larger than those measured; the others must be equal


def fastest(gpu: str, operation: str, dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    """The backend whose committed measurement was faster for these sizes, or None."""
    wanted = operation, str(dtype).removeprefix("torch.")
    for rule in _rules(gpu):
        fits = all(_fits(name, size, rule["sizes"].get(name)) for name, size in sizes.items())
        if fits and (rule["operation"], rule["dtype"]) == wanted:
            return str(rule["backend"])
    return None


def _fits(name: str, size: int, measured: int | None) -> bool:
    if measured is None:
        return False
    return size >= measured if name in COUNTS else size == measured


# torch.compile does not trace reading a file; comparing sizes with the rules it does.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _rules(gpu: str) -> list[dict[str, Any]]:
    return _read(gpu)


@functools.cache
def _read(gpu: str) -> list[dict[str, Any]]:
    path = FOLDER / f"{slug(gpu)}.json"
    return list(json.loads(path.read_text())["rules"]) if path.exists() else []


def slug(gpu: str) -> str:
    """A GPU's name as a file name: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
