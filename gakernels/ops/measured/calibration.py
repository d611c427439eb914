"""What `gakernels calibrate` found on this machine: which kernels are right on its GPU, and how long they took.

The record lies in the user's cache folder, one for each kind of GPU. It goes for the versions that it was made with.
"""

import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import Any

from gakernels.errors import FormatError, InputError
from gakernels.ops.gpus import Gpu, slug
from gakernels.paths import cache_folder
from gakernels.version import __version__

KIND = "gakernels calibration"
COMMAND = "gakernels calibrate"


def path_of(gpu: Gpu) -> Path:
    """`$XDG_CACHE_HOME/gakernels/calibration/<gpu>.json`, by default in `~/.cache`.

    Raises:
        InputError: the user has no home folder.
    """
    return cache_folder("calibration") / f"{slug(gpu.name)}.json"


def versions() -> dict[str, str]:
    """What a record goes for."""
    return {"gakernels": __version__, "torch": _version("torch"), "triton": _version("triton")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def stored(gpu: Gpu) -> dict[str, Any] | None:
    """The record of a GPU, whatever its versions, or None; where it can't be read, a warning says so.

    Raises:
        FormatError: the file of that name is no record.
    """
    try:
        path = path_of(gpu)
    except InputError:  # no place, no record
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _check(record)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        warnings.warn(f"{path} can't be read ({error.strerror}); it is ignored", stacklevel=2)
        return None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{path} must be a calibration record, but it is not; run `{COMMAND}` again") from error
    return dict(record)


def read(gpu: Gpu) -> dict[str, Any] | None:
    """The record of a GPU if it goes for the versions in use, else None. Raises: FormatError: see `stored`."""
    record = stored(gpu)
    return record if record is not None and record["versions"] == versions() else None


def _check(record: Any) -> None:
    from gakernels.ops.measured import costs, measurements

    if record["kind"] != KIND or not isinstance(record["versions"], dict):
        raise ValueError("its kind differs")
    if not all(type(verdict) is str for verdict in record["checks"].values()):
        raise TypeError("its checks differ")
    for row in measurements(record, calibrated=True):
        times = min(*row.forward_ms, *row.backward_ms, row.gemm_flops)
        if not (times >= 0 and min(row.copy_bytes, costs.operations(row.operation, row.sizes)) > 0):
            raise ValueError("its rows differ")


def obstacle(gpu: Gpu, operation: str, backend: str, verified: bool) -> str | None:
    """Why a kernel is not to run by default on a GPU, or None if it is.

    Args:
        verified: whether the kernels were checked on GPUs of that capability before; then only a failure counts.
    """
    record = read(gpu)
    verdict = None if record is None else record["checks"].get(f"{operation}.{backend}")
    if verdict is None:
        return None if verified else f"not checked on this GPU yet: run `{COMMAND}`"
    return f"it failed the check of `{COMMAND}` on this GPU: {verdict}" if verdict else None
