"""Reading and writing this library's files: safetensors with a JSON description in the header, replaced atomically."""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gakernels.errors import FormatError, InputError
from gakernels.fingerprint import tensor_fingerprint
from gakernels.version import __version__

FORMAT_VERSION = 1
_HEADER_KEY = "gakernels"
_HEADER_CHECKSUM_KEY = "gakernels_header_sha256"  # missing in the files of early versions


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block ends well, what it wrote there takes the place of `path`.

    Whatever happens in between, the file that was there before stays as it was. Where the block made a folder, its
    files go into the folder `path`, each in one step; other files that are there are left alone.

    Raises:
        InputError: a folder is to be written where there is a file, or a file where there is a folder.
        OSError: the block could not write, for instance because no space is left; nothing is left behind.
    """
    path = path.resolve() if path.is_dir() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _flush(temporary)
        if path.exists() and path.is_dir() != temporary.is_dir():
            there, here = ("folder", "file") if path.is_dir() else ("file", "folder")
            raise InputError(f"{path} is a {there}, so no {here} can be written under that name")
        if path.is_dir():
            for file in sorted(temporary.iterdir(), reverse=True):
                file.replace(path / file.name)
            _flush_folder(path)
        else:
            temporary.replace(path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise _named(error, temporary, path) from error
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
        description: JSON types; kept in the header together with the versions and a checksum of the tensors.

    Raises:
        OSError: the file could not be written; an older file of that name is unharmed.
    """
    header = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "gakernels_version": __version__,
        "checksum": tensor_fingerprint(tensors.items()),
        **description,
    }
    text = json.dumps(header)
    with replacing(path) as temporary:
        _save(temporary, tensors, {_HEADER_KEY: text, _HEADER_CHECKSUM_KEY: _sha256(text), "format": "pt"})


def write_plain_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in another library's format (`save_file` with no description), atomically."""
    with replacing(path) as temporary:
        _save(temporary, tensors, {"format": "pt"})


def read_plain_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of another library: its tensors, on the CPU.

    Raises:
        InputError: there is no such file.
        FormatError: it is damaged or no safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: the tensors, on the CPU, and the description.

    Raises:
        InputError: there is no such file.
        FormatError: it is damaged, of another kind, or of a newer format.
    """
    description = read_description(path, kind)
    tensors = read_plain_tensors(path)
    if tensor_fingerprint(tensors.items()) != entry(path, description, "checksum"):
        raise FormatError(f"{path} is damaged: its numbers do not have the checksum that its header names")
    return tensors, description


def read_description(path: Path, kind: str) -> dict[str, Any]:
    """The description of a file of ours, without its tensors. Raises as `read_tensors`."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
    text = metadata.get(_HEADER_KEY)
    if text is None:
        raise FormatError(f"{path} is not a gakernels file: its header has no {_HEADER_KEY!r} entry")
    if metadata.get(_HEADER_CHECKSUM_KEY, _sha256(text)) != _sha256(text):
        raise FormatError(f"{path} is damaged: its header does not have the checksum that stands beside it")
    description = _parse(path, text)
    if description["kind"] != kind:
        raise FormatError(f"{path} must be a {kind} file, but it is a {description['kind']} file")
    if description["format_version"] > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {description['format_version']}, written by gakernels "
            f"{description['gakernels_version']}; this version reads up to {FORMAT_VERSION}: upgrade gakernels"
        )
    return description


def by_suffix(path: Path, tensors: Mapping[str, Tensor], *suffixes: str) -> list[dict[str, Tensor]]:
    """The tensors of a file for each ending of their names, under the names without it.

    Raises:
        FormatError: a name has none of the endings.
    """
    groups = [
        {name.removesuffix(suffix): tensor for name, tensor in tensors.items() if name.endswith(suffix)}
        for suffix in suffixes
    ]
    if sum(len(group) for group in groups) != len(tensors):
        raise FormatError(f"{path} is damaged: it holds tensors whose names do not end in {' or '.join(suffixes)}")
    return groups


def entry(path: Path, description: Mapping[str, Any], name: str, kind: type | None = None) -> Any:
    """One entry of a description; `float` stands for any finite number.

    Raises:
        FormatError: there is none of that name, or it is of another type.
    """
    if name not in description:
        raise FormatError(f"{path} is damaged: it has no entry {name!r}")
    value = description[name]
    if kind is not None and not _is_of(value, kind):
        raise FormatError(
            f"{path} is damaged: its entry {name!r} must be of type {kind.__name__}, but it is {value!r:.60}"
        )
    return value


def count_entry(path: Path, description: Mapping[str, Any], name: str, least: int = 0) -> int:
    """An entry that counts something. Raises: FormatError: it is missing or no integer of at least `least`."""
    count: int = entry(path, description, name, int)
    if count < least:
        raise FormatError(f"{path} is damaged: its entry {name!r} must be at least {least}, but it is {count}")
    return count


def _is_of(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: its header is no JSON ({error})") from error
    if not isinstance(description, dict):
        raise FormatError(f"{path} is damaged: its header is no JSON object")
    for name, kind in (("kind", str), ("format_version", int), ("gakernels_version", str)):
        entry(path, description, name, kind)
    return description


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise FormatError(f"{path} is damaged or is no safetensors file: {error}") from error


def _save(temporary: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary.touch()
    mode = temporary.stat().st_mode  # save_file lets only the owner read, whatever the umask says
    save_file(contiguous, temporary, metadata=metadata)
    temporary.chmod(mode)


def _named(error: OSError | SafetensorError, temporary: Path, path: Path) -> OSError:
    """The same failure with the name that the user knows; a write to a full disk names no file, others `temporary`."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, str(error.filename or path).replace(str(temporary), str(path)))
    message = str(error).replace(str(temporary), str(path))
    return OSError(message if str(path) in message else f"{path} could not be written: {message}")


def _flush(path: Path) -> None:
    """Bring a file, or each file of a folder, to the disk before it gets its name."""
    for file in [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _flush_folder(path: Path) -> None:
    """Bring the names in a folder to the disk, so that a renamed file is there after a loss of power too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
