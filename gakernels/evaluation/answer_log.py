"""AnswerLog: answers in JSON-lines files next to the report, so that an interrupted run loses none of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gakernels.errors import InputError
from gakernels.evaluation.scenarios import Answer
from gakernels.files import append_line

Key = tuple[int, int, int]


@dataclass(frozen=True)
class Entry:
    """A line of a log: answers from one batch, or what preparation took.

    Attributes:
        method: name of the method.
        answers: pairs of (case, question, option) and answer.
        facts: measured numbers and counts.
    """

    method: str
    answers: tuple[tuple[Key, Answer], ...]
    facts: Mapping[str, Any]


class AnswerLog:
    """The answers of a run so far: from all processes, from this call and earlier ones.

    The first process writes to `NAME.answers.jsonl`, process k to `NAME.answers.k.jsonl`, where the report is
    `NAME.json`. The first line of each holds the settings.

    Args:
        report: where the report will be; None to keep the answers in memory only.
        settings: what the answers depend on, JSON types.
        rank: of this process.

    Raises:
        InputError: there are answers with other settings, or a file is not such a log.
    """

    def __init__(self, report: Path | None, settings: Mapping[str, Any], rank: int = 0) -> None:
        self._entries: list[Entry] = []
        self._report, self._path = report, None
        self._settings = json.loads(json.dumps(settings))
        if report is not None:
            name = f"{report.stem}.answers{f'.{rank}' if rank else ''}.jsonl"
            self._path = report.with_name(name)
            self.reload()

    def reload(self) -> None:
        """Read the files of all processes again."""
        if self._report is not None:
            self._entries = [entry for path in self._files() for entry in self._read(path)]

    def answers(self, method: str) -> dict[Key, Answer]:
        """All answers of a method."""
        return {key: answer for entry in self._entries if entry.method == method for key, answer in entry.answers}

    def facts(self, method: str) -> list[Mapping[str, Any]]:
        """The measurements of a method, in the order of the log."""
        return [entry.facts for entry in self._entries if entry.method == method]

    def add(self, entry: Entry) -> None:
        """Append a line and flush it to disk."""
        self._entries.append(entry)
        if self._path is None:
            return
        line = json.dumps({"method": entry.method, "answers": entry.answers, **entry.facts})
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"settings": self._settings}) + "\n" + line
        append_line(self._path, line)

    def _files(self) -> list[Path]:
        assert self._report is not None
        stem = f"{self._report.stem}.answers"
        numbered = self._report.parent.glob(f"{stem}.*.jsonl")
        others = [path for path in numbered if path.name[len(stem) + 1 : -len(".jsonl")].isdecimal()]
        first = self._report.with_name(f"{stem}.jsonl")
        return [path for path in (first, *sorted(others)) if path.is_file()]

    def _read(self, path: Path) -> Iterator[Entry]:
        """The entries of a file. A torn line of an interrupted process is cut off; its answers are asked for again."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if path == self._path and len(whole) < len(content):
            os.truncate(path, len(whole))
        lines = [_parsed(line) for line in whole.split(b"\n")[:-1]]
        if not lines:
            if path == self._path:
                path.unlink()
            return
        self._check_settings(path, lines[0])
        for line in lines[1:]:
            if line is not None and "method" in line:
                yield _entry(line)

    def _check_settings(self, path: Path, first: dict[str, Any] | None) -> None:
        found = (first or {}).get("settings")
        if not isinstance(found, dict):
            raise InputError(f"{path} is not a log of answers: its first line names no settings; choose another --json")
        for name in sorted(set(found) | set(self._settings)):
            there, here = found.get(name), self._settings.get(name)
            if there != here:
                raise InputError(
                    f"{path} holds answers of a run with other settings: {name} was {there!r} and is {here!r} now; "
                    "continue with the old settings, delete that file, or choose another --json"
                )


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _entry(line: dict[str, Any]) -> Entry:
    answers = tuple(
        ((int(case), int(question), int(option)), answer if isinstance(answer, str) else (answer[0], answer[1]))
        for (case, question, option), answer in line.get("answers", ())
    )
    return Entry(line["method"], answers, {name: line[name] for name in line if name not in ("method", "answers")})
