"""Which files of a folder are data, and what each holds."""

from collections.abc import Set
from pathlib import Path

from gakernels.data.bad_records import HIDDEN, BadRecords
from gakernels.data.compression import COMPRESSIONS, kind_of
from gakernels.errors import InputError

TEXT, JSON_LINES, PARQUET = {".txt", ".md", ".text"}, {".jsonl", ".ndjson"}, {".parquet"}
KINDS = frozenset(TEXT | JSON_LINES | PARQUET)


def find_files(path: Path, kinds: Set[str] = KINDS, bad: BadRecords | None = None) -> list[Path]:
    """The files of given kinds in a folder and its subfolders, sorted by name; or the file itself, if it is a file.

    A file is left out if its name, or that of a folder between `path` and it, begins with a dot: tools keep old
    states there (`.ipynb_checkpoints`, `.git`).

    Args:
        path: the folder or file.
        kinds: suffixes of the names, without a compression suffix.
        bad: counts the hidden files.

    Raises:
        InputError: the path does not exist or holds no such file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"data: there is no file or folder {path}")
    found = sorted(file for file in path.rglob("*") if kind_of(file) in kinds and file.is_file())
    hidden = {file for file in found if any(part.startswith(".") for part in file.relative_to(path).parts)}
    files = [file for file in found if file not in hidden]
    if not files:
        ends = ", ".join(sorted(kinds))
        besides = f", but {len(hidden)} under hidden names" if hidden else ""
        raise InputError(
            f"data: {path} holds no file that ends in {ends} (or {', '.join(COMPRESSIONS)} behind it){besides}"
        )
    if bad is not None:
        for file in sorted(hidden):
            bad.add(HIDDEN, str(file))
    return files
