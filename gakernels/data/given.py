"""What the data of a run was made of: compared when the run is resumed, and named where it has changed."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gakernels.data.conversations import ContextRecord
from gakernels.data.files import find_files
from gakernels.data.instruction_sources import KINDS, InstructionSource
from gakernels.data.sources import HUB, file_sha256


def source_given(source: InstructionSource, records: Sequence[ContextRecord]) -> dict[str, Any]:
    """A source as it was read: how, from which files, and what came of it, in JSON types."""
    rows = hashlib.sha256()
    for record in records:
        rows.update(json.dumps(asdict(record)).encode() + b"\n")
    root = Path(source.path)
    files = [] if source.path.startswith(HUB) else find_files(root, KINDS)
    return {
        "shots": source.shots,
        "queries": source.queries,
        "files": {(file.name if file == root else str(file.relative_to(root))): file_sha256(file) for file in files},
        "rows": rows.hexdigest()[:32],
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what is different between what two runs were given; their sources stand under `sources`."""
    found = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - {"sources"})
        if before.get(name) != now.get(name)
    ]
    there, here = before["sources"], now["sources"]
    for name in [*here, *(name for name in there if name not in here)]:
        if name not in there or name not in here:
            found.append(f"the source {name!r} is {'new' if name in here else 'missing'}")
        elif there[name]["rows"] != here[name]["rows"]:
            found.append(f"the source {name!r} has other rows: " + "; ".join(_reasons(there[name], here[name])))
    return found


def _reasons(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    reasons = [
        f"{name} was {before[name]} and is {now[name]}" for name in ("shots", "queries") if before[name] != now[name]
    ]
    there, here = before["files"], now["files"]
    for name in sorted(there.keys() | here.keys()):
        if name not in there or name not in here:
            reasons.append(f"the file {name} is {'new' if name in here else 'missing'}")
        elif there[name] != here[name]:
            reasons.append(f"the file {name} has other contents")
    yield from reasons or ["the data set of the hub has changed, or another version of gakernels reads the files"]
