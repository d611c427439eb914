"""Conversion of checkpoints of format version 2, which contain a pickle, to the present version."""

import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from gakernels.errors import FormatError, InputError
from gakernels.files import replacing_folder
from gakernels.training.checkpoint import (
    LAST_WITH_PICKLE,
    MANIFEST,
    check_files,
    find_checkpoints,
    read_any_manifest,
    write_whole,
)


def convert(folder: Path) -> list[Path]:
    """Rewrite the checkpoints of version 2 in a folder. **Reading them runs the code in their pickles.**

    Args:
        folder: a checkpoint, the folder `checkpoints` of a run, or the run's folder.

    Returns:
        The rewritten checkpoints; newer ones are left alone.

    Raises:
        InputError: there is no checkpoint.
        FormatError: one is damaged.
    """
    found = next((paths for paths in map(_checkpoints, (folder, folder / "checkpoints")) if paths), None)
    if found is None:
        raise InputError(f"there is no checkpoint in {folder}")
    old = [path for path in found if read_any_manifest(path)["format_version"] == LAST_WITH_PICKLE]
    for path in old:
        _convert(path)
    return old


def _checkpoints(folder: Path) -> list[Path]:
    return [folder] if (folder / MANIFEST).is_file() else find_checkpoints(folder)


def _convert(path: Path) -> None:
    manifest = read_any_manifest(path)
    check_files(path, manifest)
    reader = FileSystemReader(path)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in entries.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise FormatError(f"{path} is damaged: {name} is not a tensor")
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    load(tensors, storage_reader=reader, no_dist=True)
    before = path.with_name(path.name + ".converted")
    with replacing_folder(path.with_name(path.name + ".new")) as temporary:
        write_whole(temporary, tensors, manifest)
    path.rename(before)
    path.with_name(path.name + ".new").rename(path)
    shutil.rmtree(before)
