"""Reading and writing this library's files: safetensors with a JSON description in the header, replaced atomically."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gakernels.errors import FormatError, InputError
from gakernels.version import __version__

FORMAT_VERSION = 1
_HEADER_KEY = "gakernels"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block ends well, it takes the place of `path` in one step.

    Whatever happens in between, the file that was there before stays as it was. For a folder, an old one is set aside
    for the moment of the change.

    Raises:
        OSError: the block could not write, for instance because no space is left; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        _flush(temporary)
        if path.is_dir():
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(aside)
            temporary.rename(path)
            _remove(aside)
        else:
            temporary.replace(path)
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a small text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors with what they are, atomically.

    Args:
        path: the file.
        kind: what the file holds: `generator`, `adapter`, `state`, ...
        tensors: by name.
        description: JSON types; kept in the header together with the versions.

    Raises:
        OSError: the file could not be written; an older file of that name is unharmed.
    """
    header = {"kind": kind, "format_version": FORMAT_VERSION, "gakernels_version": __version__, **description}
    with replacing(path) as temporary:
        _save(temporary, path, tensors, {_HEADER_KEY: json.dumps(header), "format": "pt"})


def write_plain_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in another library's format (`save_file` with no description), atomically."""
    with replacing(path) as temporary:
        _save(temporary, path, tensors, {"format": "pt"})


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: the tensors, on the CPU, and the description.

    Raises:
        InputError: there is no such file.
        FormatError: it is damaged, of another kind, or of a newer format.
    """
    description = read_description(path, kind)
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors, description


def read_description(path: Path, kind: str) -> dict[str, Any]:
    """The description of a file of ours, without its tensors. Raises as `read_tensors`."""
    with _opened(path) as file:
        text = (file.metadata() or {}).get(_HEADER_KEY)
    if text is None:
        raise FormatError(f"{path} is not a gakernels file: its header has no {_HEADER_KEY!r} entry")
    description: dict[str, Any] = json.loads(text)
    if description["kind"] != kind:
        raise FormatError(f"{path} must be a {kind} file, but it is a {description['kind']} file")
    if description["format_version"] > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {description['format_version']}, written by gakernels "
            f"{description['gakernels_version']}; this version reads up to {FORMAT_VERSION}: upgrade gakernels"
        )
    return description


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise FormatError(f"{path} is damaged or is no safetensors file: {error}") from error


def _save(temporary: Path, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, temporary, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def _flush(path: Path) -> None:
    """Bring a file, or each file of a folder, to the disk before it gets its name."""
    for file in [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
