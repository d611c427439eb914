"""Tile sizes and other launch settings of the kernels, from tables that come with the library.

`default.json` holds settings for every kernel that are valid everywhere and chosen by counts for a Hopper GPU;
`small.json` those for GPUs with less shared memory; `<gpu>.json`, if there is one, the fastest measured ones for that
GPU (written by `python -m benchmarks.tune`). Nothing is tuned at run time. `GAKERNELS_TUNED` names one more table,
which is searched first.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

from gakernels.errors import FormatError, InputError
from gakernels.ops import gpus

ENVIRONMENT_VARIABLE = "GAKERNELS_TUNED"
FOLDER = Path(__file__).parent
DEFAULT, SMALL = FOLDER / "default.json", FOLDER / "small.json"
DEFAULT_SHARED_MEMORY = 163_840  # bytes that the largest settings of DEFAULT take (benchmarks.kernel_resources)


def settings(kernel: str, device: torch.device, dtype: torch.dtype, **sizes: int) -> dict[str, int]:
    """The launch settings of a kernel: the first entry of the tables that fits.

    Args:
        kernel: its name in the tables, `operation.kernel`.
        device: where it will run.
        dtype: of its inputs.
        sizes: the sizes that entries may match, as `hidden=4096`.

    Raises:
        InputError: `GAKERNELS_TUNED` names no file.
        FormatError: the file is not such a table.
    """
    name = str(dtype).removeprefix("torch.")
    for path in _tables(device):
        for entry in _entries(path).get(kernel, ()):
            fits = all(sizes.get(size) == value for size, value in entry.get("sizes", {}).items())
            if name in entry["dtypes"] and fits:
                return dict(entry["settings"])
    raise LookupError(f"{DEFAULT.name} has no settings of {kernel} for {name}")


def _tables(device: torch.device) -> list[Path]:
    tables = [DEFAULT]
    gpu = gpus.gpu_of(device.type, device.index)
    if gpu is not None:
        if gpu.shared_memory < DEFAULT_SHARED_MEMORY:
            tables.insert(0, SMALL)
        tables.insert(0, FOLDER / f"{gpus.slug(gpu.name)}.json")
    own = os.environ.get(ENVIRONMENT_VARIABLE)
    if own:
        if not Path(own).is_file():
            raise InputError(f"{ENVIRONMENT_VARIABLE} must name a file of launch settings, but there is none at {own}")
        tables.insert(0, Path(own))
    return tables


@functools.cache
def _entries(path: Path) -> dict[str, list[dict[str, Any]]]:
    if not path.exists():
        return {}
    try:
        kernels = json.loads(path.read_text())["kernels"]
        return {str(name): [_checked(entry) for entry in entries] for name, entries in kernels.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is not a table of launch settings: {error!r}") from error


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    numbers = {**entry.get("sizes", {}), **entry["settings"]}
    if not isinstance(entry["dtypes"], list) or not all(type(number) is int for number in numbers.values()):
        raise TypeError(f"an entry needs a list of dtypes and whole numbers, but one is {entry}")
    return entry
