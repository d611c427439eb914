"""Reading and writing this library's files: safetensors with a JSON description in the header, replaced atomically."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from gakernels.errors import FormatError, InputError
from gakernels.fingerprint import tensor_fingerprint
from gakernels.version import __version__

FORMAT_VERSION = 1
_HEADER_KEY = "gakernels"
_HEADER_CHECKSUM_KEY = "gakernels_header_sha256"  # missing from files of early versions
_BLOCK = 1 << 20  # bytes read at once
_STANDARD = {"/dev/stdout": "/dev/fd/1", "/dev/stderr": "/dev/fd/2"}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; if the block succeeds, the file written there replaces `path`.

    If it fails, an existing file stays unchanged. An existing file keeps its mode; a new one gets the mode that follows
    from the umask. A symbolic link stays, and its target is written. A pipe, a device, or an open file of this process
    (`/dev/stdout`) is never replaced: it is written to after the block has ended.

    Raises:
        InputError: `path` is a folder.
        OSError: the block could not write, for instance because the disk is full; no temporary file is left behind.
    """
    path = _target(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, so no file can be written under that name")
    if _descriptor(path) is not None or (path.exists() and not path.is_file()):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            _pour(Path(folder) / path.name, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.touch()
        mode = _mode(path if path.exists() else temporary)
        temporary.chmod(mode | 0o600)  # from the start: nobody may read it now who may not read it later
        yield temporary
        _flush(temporary)
        temporary.chmod(mode)  # some writers create a new file, which nobody else may read
        temporary.replace(path)
        flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise _named(error, temporary, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: yields an empty one.

    If the folder exists already, each file is moved into it atomically; other files in it are left alone.

    Raises:
        InputError: `path` exists but is not a folder.
        OSError: as for `replacing`.
    """
    path = _target(path)
    if path.exists() and not path.is_dir():
        kind = "file" if path.is_file() else "device or pipe"
        raise InputError(f"{path} is a {kind}, so no folder can be written under that name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.mkdir()
        yield temporary
        files = sorted((file for file in temporary.rglob("*") if file.is_file()), reverse=True)
        for file in files:
            _flush(file)
            file.chmod(_mode(temporary) & 0o666)  # as in `replacing`
        if path.is_dir():
            for file in files:
                _move(file, path / file.relative_to(temporary))
            flush_folder(path)
        else:
            temporary.replace(path)
        flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise _named(error, temporary, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; it is on disk when this returns. A failure may leave part of the line."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors and their description, atomically.

    Args:
        path: the file.
        kind: what the file holds: `generator`, `adapter`, `state`, ...
        tensors: the tensors by name.
        description: JSON types; stored in the header together with the versions and a checksum of the tensors.

    Raises:
        OSError: the file could not be written; an existing file of that name is unchanged.
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
    """Read the tensors of another library's safetensors file, onto the CPU.

    Raises:
        InputError: there is no such file.
        FormatError: it is damaged or not a safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def read_tensors(path: Path, kind: str, copied: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: the tensors, on the CPU, and the description.

    Args:
        path: the file.
        kind: what the file must hold.
        copied: whether the tensors are copies rather than views of the file: for small files that a process reads
            repeatedly, or that may change while it uses them.

    Raises:
        InputError: there is no such file.
        FormatError: it is damaged, of another kind, or of a newer format.
    """
    description = read_description(path, kind)
    tensors = _copies(path) if copied else read_plain_tensors(path)
    if tensor_fingerprint(tensors.items()) != entry(path, description, "checksum"):
        raise FormatError(f"{path} is damaged: its numbers do not match the checksum in its header")
    return tensors, description


def read_description(path: Path, kind: str) -> dict[str, Any]:
    """The description of one of our files, without its tensors. Raises what `read_tensors` raises."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
    text = metadata.get(_HEADER_KEY)
    if text is None:
        raise FormatError(f"{path} is not a gakernels file: its header has no {_HEADER_KEY!r} entry")
    if metadata.get(_HEADER_CHECKSUM_KEY, _sha256(text)) != _sha256(text):
        raise FormatError(f"{path} is damaged: its header does not match the checksum stored with it")
    description = _parse(path, text)
    if description["kind"] != kind:
        raise FormatError(f"{path} must be a {kind} file, but it is a {description['kind']} file")
    if description["format_version"] > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {description['format_version']}, written by gakernels "
            f"{description['gakernels_version']}; this version reads up to {FORMAT_VERSION}: upgrade gakernels"
        )
    return description


def flush_folder(path: Path) -> None:
    """Flush a folder's entries to disk, so that a renamed file survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as it is on disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def by_suffix(path: Path, tensors: Mapping[str, Tensor], *suffixes: str) -> list[dict[str, Tensor]]:
    """The tensors of a file grouped by the suffix of their names, under the names without the suffix.

    Raises:
        FormatError: a name has none of the suffixes.
    """
    groups = [
        {name.removesuffix(suffix): tensor for name, tensor in tensors.items() if name.endswith(suffix)}
        for suffix in suffixes
    ]
    if sum(len(group) for group in groups) != len(tensors):
        raise FormatError(f"{path} is damaged: it holds tensors whose names do not end in {' or '.join(suffixes)}")
    return groups


def entry(path: Path, description: Mapping[str, Any], name: str, kind: type | None = None) -> Any:
    """One entry of a description; `float` accepts any finite number.

    Raises:
        FormatError: the entry is missing or has another type.
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
    """An entry that is a count. Raises: FormatError: it is missing or not an integer of at least `least`."""
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
        raise FormatError(f"{path} is damaged: its header is not JSON ({error})") from error
    if not isinstance(description, dict):
        raise FormatError(f"{path} is damaged: its header is not a JSON object")
    for name, kind in (("kind", str), ("format_version", int), ("gakernels_version", str)):
        entry(path, description, name, kind)
    return description


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    with _damage(path), safe_open(path, framework="pt") as file:
        yield file


def _copies(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in PyTorch's own memory, sorted by name (`load` returns them in no fixed order).

    `safe_open` is not used: it leaks two integers per tensor, its start and end (safetensors 0.8.0).
    """
    with _damage(path):
        return {name: tensor.clone() for name, tensor in sorted(load(path.read_bytes()).items())}


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, KeyError) as error:  # KeyError: older versions do not know the data type
        raise FormatError(f"{path} is damaged or is not a safetensors file: {error}") from error


def _save(temporary: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata=metadata)


def _named(error: OSError | SafetensorError, temporary: Path, path: Path) -> OSError:
    """The same error with the path that the user knows: a full disk's names no file, others name `temporary`."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, str(error.filename or path).replace(str(temporary), str(path)))
    message = str(error).replace(str(temporary), str(path))
    return OSError(message if str(path) in message else f"{path} could not be written: {message}")


def _target(path: Path) -> Path:
    """The path that is actually written: links are followed, and `.` gets a name."""
    if _descriptor(path) is not None or not (path.is_symlink() or path.is_dir()):
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _descriptor(path: Path) -> int | None:
    """The file descriptor of this process that a path names: reopening the file would write from its start."""
    found = _DESCRIPTOR.fullmatch(_STANDARD.get(str(path), str(path)))
    return int(found[1]) if found else None


def _beside(path: Path) -> Path:
    """A new name, hardly longer than the file's own, which may be as long as the file system allows."""
    return path.with_name(f".{path.name[:50]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _pour(file: Path, path: Path) -> None:
    """Copy a file into a pipe, device or descriptor."""
    number = _descriptor(path)
    try:
        with file.open("rb") as source, path.open("wb") if number is None else os.fdopen(os.dup(number), "wb") as sink:
            shutil.copyfileobj(source, sink)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _move(file: Path, target: Path) -> None:
    """Move a finished file into an existing folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or (target.exists() and not target.is_file()):
        with replacing(target) as temporary:  # which may be on another disk
            shutil.copyfile(file, temporary)
        return
    if target.exists():
        file.chmod(_mode(target))
    file.replace(target)


def _flush(path: Path) -> None:
    """Flush a file to disk before it gets its final name."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
