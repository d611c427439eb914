"""Checkpoints of a training run: everything needed to resume exactly, with any number of processes.

A checkpoint is a folder of safetensors files (every process writes its part, by PyTorch's distributed checkpoint), and
`manifest.json` with the settings of the run and a checksum of every file. It gets its name once all of it is on
disk. It contains no pickle: reading one runs no code. Format versions up to 2 did, see `convert`.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gakernels.distributed import Parallel
from gakernels.errors import FormatError
from gakernels.files import file_sha256, replacing_folder
from gakernels.version import __version__

FORMAT_VERSION = 3  # 1: a safetensors file; 2: PyTorch's own files, one of which was a pickle
LAST_WITH_PICKLE = 2
MANIFEST = "manifest.json"
TENSORS = "*.safetensors"
FILE_BYTES = 2**30  # about the size of a file; a larger tensor has its own file
_NAME = re.compile(r"step-(\d{8})")
_UNFINISHED = re.compile(r"\.step-\d{8}\..*\.tmp")


class _DamagedError(FormatError):
    """A checkpoint that is not as it was written, as opposed to one that this version or run can't use."""


@dataclass(frozen=True)
class RunState:
    """The part of a run that is kept.

    Attributes:
        parameters: what is trained, by name; plain tensors or `DTensor`s.
        optimizer: AdamW over them.
        tensors: other tensors of the run, the same on all processes; loading a checkpoint writes into them.
        settings: what the run depends on, in JSON types.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def by_name(self) -> dict[str, Tensor]:
        """All tensors by name; those of an optimizer that has not taken a step yet are zeros."""
        found = {f"run/{name}": tensor for name, tensor in self.tensors.items()}
        for name, parameter in self.parameters.items():
            found[f"parameter/{name}"] = parameter.detach()
            for key, value in self._moments(parameter).items():
                found[f"{key}/{name}"] = value
        return found

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter.detach())
            state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
        return state


@contextmanager
def checkpoint_writer(parallel: Parallel) -> Iterator["CheckpointWriter"]:
    """A `CheckpointWriter` while the block runs; all processes call this together.

    Raises:
        OSError: the last checkpoint could not be written; the earlier ones are intact.
    """
    with _quiet(), ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as thread:
        writer = CheckpointWriter(parallel.aside(), thread)
        try:
            yield writer
        finally:
            writer.wait()


class CheckpointWriter:
    """Writes checkpoints in a thread while training goes on; only the copy to the host holds it up.

    See `checkpoint_writer`. All processes call its methods together.

    Args:
        parallel: the processes, with connections that nothing else uses.
        thread: writes one checkpoint after another.
    """

    def __init__(self, parallel: Parallel, thread: Executor) -> None:
        self._parallel, self._thread = parallel, thread
        self._written: Future[None] | None = None

    def save(self, folder: Path, step: int, state: RunState, notes: Mapping[str, Any], keep: int = 2) -> None:
        """Begin to write a checkpoint after a step to `folder/step-<number>/`.

        Each process writes its part. Once all of it is on disk, the checkpoint gets its name, and all but the newest
        `keep` are deleted.

        Args:
            folder: the folder of the checkpoints.
            step: number of steps taken.
            state: what is kept; it may change as soon as this returns.
            notes: values of JSON types that `load_checkpoint` returns.
            keep: how many to keep, including this one.

        Raises:
            OSError: the checkpoint before could not be written.
        """
        self.wait()
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.by_name().items()}
        entries = {"step": step, "settings": dict(state.settings), "notes": dict(notes)}
        path = folder / f"step-{step:08d}"
        self._written = self._thread.submit(_write, path, tensors, entries, self._parallel, keep)

    def wait(self) -> None:
        """Return once the last checkpoint is complete.

        Raises:
            OSError: it could not be written; the earlier checkpoints are intact.
        """
        written, self._written = self._written, None
        if written:
            written.result()


def _write(
    path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, Any], parallel: Parallel, keep: int
) -> None:
    with _one_writes(path, parallel) as temporary:
        _save(temporary, tensors, parallel)
        sums = {name: sum for part in parallel.gather(_own_sums(temporary, parallel)) for name, sum in part.items()}
        if parallel.ranks.rank == 0:
            _write_manifest(temporary / MANIFEST, {**entries, "files": sums})
    if parallel.ranks.rank == 0:
        for old in find_checkpoints(path.parent)[:-keep]:
            shutil.rmtree(old)


def write_whole(folder: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write a checkpoint of one process to an existing folder, with the entries of another checkpoint's manifest."""
    alone = Parallel()
    with _quiet():
        _save(folder, tensors, alone)
    entries = {name: manifest[name] for name in ("step", "settings", "notes")}
    _write_manifest(folder / MANIFEST, {**entries, "files": _own_sums(folder, alone)})


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def newest_good(folder: Path, settings: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint; damaged ones are renamed to end in `.damaged`.

    Unfinished checkpoints of a killed process are deleted.

    Returns:
        The checkpoint, or None if there is none; and descriptions of what was damaged.

    Raises:
        FormatError: it belongs to a run with other settings or was written by a newer version, or all checkpoints are
            damaged.
    """
    for path in folder.glob(".step-*.tmp"):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    damage: list[str] = []
    for path in reversed(find_checkpoints(folder)):
        try:
            manifest = _verified(path)
        except _DamagedError as error:
            damage.append(str(error))
            continue
        _check_settings(path, manifest["settings"], json.loads(json.dumps(dict(settings))))
        _put_aside([bad for bad in find_checkpoints(folder) if bad > path])
        return path, damage
    if damage:
        raise FormatError("; ".join(damage) + ". None is left to resume from: delete them, or use another folder")
    return None, damage


def saved_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in the newest checkpoint with an intact manifest; None if there is none."""
    for path in reversed(find_checkpoints(folder)):
        try:
            settings: dict[str, Any] = read_any_manifest(path)["settings"]
        except (_DamagedError, KeyError):
            continue
        return settings
    return None


def load_checkpoint(path: Path, state: RunState, parallel: Parallel) -> tuple[int, dict[str, Any]]:
    """Restore what a `CheckpointWriter` kept, into the existing tensors. All processes call this together.

    Returns:
        The number of steps taken, and the notes.

    Raises:
        FormatError: its parameters are not those of `state`.
    """
    tensors = state.by_name()
    reader = HuggingFaceStorageReader(str(path))
    try:
        entries = reader.read_metadata().state_dict_metadata
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{path} is damaged: its tensors can't be read ({error})") from error
    saved = {name: getattr(entry, "size", None) for name, entry in entries.items()}
    if saved != {name: tensor.shape for name, tensor in tensors.items()}:
        raise FormatError(f"{path} holds other parameters than this run trains")
    with _quiet():
        load(tensors, storage_reader=reader, no_dist=parallel.ranks.world == 1)
    manifest = _read_manifest(path)
    return manifest["step"], manifest["notes"]


@contextmanager
def _one_writes(path: Path, parallel: Parallel) -> Iterator[Path]:
    """A temporary folder for all processes, renamed to `path` once all have written (`replacing_folder`)."""
    if parallel.ranks.rank > 0:
        yield parallel.broadcast(path)
        parallel.gather(None)
        return
    with replacing_folder(path) as temporary:
        parallel.broadcast(temporary)
        yield temporary
    parallel.gather(None)  # no process continues before it has its name


def _save(folder: Path, tensors: Mapping[str, Tensor], parallel: Parallel) -> None:
    files = _file_of_each(tensors)
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    try:
        alone = parallel.ranks.world == 1
        save(dict(tensors), storage_writer=writer, process_group=parallel.group, no_dist=alone)
    except CheckpointException as error:
        causes = ", ".join(dict.fromkeys(str(failure[0]).split("\n")[0] for failure in error.failures.values()))
        raise OSError(f"{folder} could not be written: {causes}") from error


def _file_of_each(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1, for each tensor or a process's part of it; the same on all processes."""
    numbers, size, number = {}, 0, 1
    for name, tensor in tensors.items():
        count = tensor.numel() * tensor.element_size()
        if size and size + count > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name] = number
        size += count
    return numbers


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning that a single process saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _own_sums(folder: Path, parallel: Parallel) -> dict[str, str]:
    """The checksums of the files that this process wrote."""
    return {path.name: file_sha256(path) for path in sorted(folder.glob(f"shard-{parallel.ranks.rank + 1:05d}-*"))}


def _write_manifest(path: Path, entries: Mapping[str, Any]) -> None:
    values = {"format_version": FORMAT_VERSION, "gakernels_version": __version__, **entries}
    text = json.dumps(values)
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}))


def read_any_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint of any format version that had one.

    Raises:
        FormatError: it is damaged.
    """
    try:
        outer = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        text: str = outer["manifest"]
        if hashlib.sha256(text.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("it does not have the checksum that it names")
        manifest: dict[str, Any] = json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _DamagedError(f"{path} is damaged: {MANIFEST} can't be read ({error})") from error
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_any_manifest(path)
    if manifest["format_version"] > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {manifest['format_version']}, written by gakernels "
            f"{manifest['gakernels_version']}; this version reads up to {FORMAT_VERSION}: upgrade gakernels"
        )
    if manifest["format_version"] <= LAST_WITH_PICKLE:
        raise FormatError(
            f"{path} has format version {manifest['format_version']}, of which a file is a pickle, which may run code "
            f"when it is read. If you trust it: gakernels convert-checkpoint {path} --trust"
        )
    return manifest


def _verified(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking that all files are present and as written."""
    manifest = _read_manifest(path)
    strange = {file.name for file in path.glob(TENSORS)} - set(manifest["files"])
    if strange:
        raise _DamagedError(f"{path} is damaged: {MANIFEST} does not name {min(strange)}")
    check_files(path, manifest)
    return manifest


def check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raises: FormatError: a file that the manifest names is missing or not as written."""
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            raise _DamagedError(f"{path} is damaged: {name} is missing")
        if file_sha256(path / name) != expected:
            raise _DamagedError(f"{path} is damaged: {name} does not have the checksum that {MANIFEST} names")


def _put_aside(paths: list[Path]) -> None:
    for path in paths:
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


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
