"""Checkpoints of a training run: everything that is needed to go on exactly."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gakernels.errors import FormatError
from gakernels.files import entry, read_tensors, write_tensors

_NAME = re.compile(r"step-(\d{8})\.safetensors")


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write parameters and optimizer state after a step to `folder/step-<number>.safetensors`; delete older ones.

    Raises:
        OSError: it could not be written; the earlier checkpoints are unharmed.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    path = folder / f"step-{step:08d}.safetensors"
    write_tensors(path, "checkpoint", tensors, {"step": step, "settings": dict(settings)})
    for old in find_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name))


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
) -> int:
    """Restore parameters and optimizer state; returns the number of steps taken.

    Raises:
        FormatError: the file is damaged, holds other parameters, or comes from a run with other settings.
    """
    tensors, description = read_tensors(path, "checkpoint")
    _check_settings(path, entry(path, description, "settings"), json.loads(json.dumps(dict(settings))))
    step = int(entry(path, description, "step"))
    names = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
    if names != set(parameters) or any(parameters[n].shape != tensors[f"parameter/{n}"].shape for n in names):
        raise FormatError(f"{path} holds other parameters than this run trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            state = {
                key.split("/", 1)[0]: value.to(parameter.device) if value.dim() else value
                for key, value in tensors.items()
                if key.split("/", 1)[1] == name and not key.startswith("parameter/")
            }
            if state:
                optimizer.state[parameter] = state
    return step


def _check_settings(path: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    before, now = _flat(saved), _flat(ours)
    missing = object()
    different = sorted(key for key in before | now if before.get(key, missing) != now.get(key, missing))
    if different:
        detail = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in different)
        raise FormatError(
            f"{path} belongs to a run with other settings: {detail}. Use another folder, or the settings from before"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names: {"trainer": {"steps": 9}} becomes {"trainer.steps": 9}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
