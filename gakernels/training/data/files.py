"""Which files of a folder are data, and what each holds."""

from collections.abc import Set
from pathlib import Path

from gakernels.errors import InputError
from gakernels.training.data.compression import COMPRESSIONS, kind_of

TEXT, JSON_LINES, PARQUET = {".txt", ".md", ".text"}, {".jsonl", ".ndjson"}, {".parquet"}
KINDS = frozenset(TEXT | JSON_LINES | PARQUET)


def find_files(path: Path, kinds: Set[str] = KINDS) -> list[Path]:
    """The files of some kinds in a folder and its subfolders, in the order of their names; or the one file, as it is.

    Args:
        path: the folder or file.
        kinds: suffixes of the names, without that of a compression.

    Raises:
        InputError: the path does not exist or holds no such file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"data: there is no file or folder {path}")
    files = sorted(file for file in path.rglob("*") if kind_of(file) in kinds and file.is_file())
    if not files:
        ends = ", ".join(sorted(kinds))
        raise InputError(f"data: {path} holds no file that ends in {ends} (or {', '.join(COMPRESSIONS)} behind it)")
    return files
