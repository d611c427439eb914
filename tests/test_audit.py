"""`make audit`: what it says of the answers that pip-audit can give, and the list of licences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KNOWN = {"name": "good", "version": "1", "vulns": []}
SKIPPED = {"name": "ours", "skip_reason": "not found"}
BAD = {"name": "bad", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1", "3.0"]}]}


def audited(tmp_path: Path, script: str) -> tuple[int, str]:
    """Run the script with another program in place of pip-audit."""
    (tmp_path / "pip_audit").mkdir()
    (tmp_path / "pip_audit" / "__init__.py").touch()
    (tmp_path / "pip_audit" / "__main__.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / ".ci" / "audit.py")]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.stderr == ""
    return process.returncode, process.stdout


@pytest.mark.parametrize(
    ("packages", "code", "line"),
    [
        ([KNOWN, SKIPPED], 0, "none in 1 packages; 1 are not known there"),
        ([KNOWN, BAD, SKIPPED], 1, "bad 2.0: PYSEC-1, fixed in 2.1, 3.0"),
        ([SKIPPED], 0, "not looked up, the service answers for none of the 1 packages"),
    ],
)
def test_a_report_is_told_in_a_line(tmp_path: Path, packages: list[object], code: int, line: str) -> None:
    report = json.dumps({"dependencies": packages, "fixes": []})
    script = f"print({report!r})\nraise SystemExit({int(code)})\n"
    assert audited(tmp_path, script) == (code, f"vulnerabilities: {line}\n")


def test_without_the_service_it_passes(tmp_path: Path) -> None:
    code, out = audited(tmp_path, "raise ConnectionError('no route to host')\n")
    assert code == 0
    assert out == "vulnerabilities: not looked up, the service can't be reached (ConnectionError: no route to host)\n"


def test_what_is_installed_has_licences_on_the_list() -> None:
    pytest.importorskip("piplicenses")
    command = [sys.executable, "-m", "piplicenses", "--format", "csv"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    process = subprocess.run([*command, "--allow-only", "MIT"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 1
    assert "not in allow-only" in process.stderr
