"""One run at a time in a folder."""

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gakernels import InputError
from gakernels.distributed import Ranks
from gakernels.training.run_folder import LOCK, only_run

HOLD = """
import sys, time
from pathlib import Path
from gakernels.distributed import Ranks
from gakernels.training.run_folder import only_run
with only_run(Path(sys.argv[1]), Ranks()):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        words = rf"another run writes to {re.escape(str(folder))} \(process {holder.pid} on .+\); wait until it ends"
        with pytest.raises(InputError, match=words), only_run(folder, Ranks()):
            pass
        with only_run(tmp_path / "other", Ranks()):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert (folder / LOCK).exists()  # left behind, which means nothing
    with only_run(folder, Ranks()):
        (folder / "log").touch()
    assert [path.name for path in folder.iterdir()] == ["log"]


def test_it_is_free_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), only_run(tmp_path, Ranks()):
        raise KeyboardInterrupt
    with only_run(tmp_path, Ranks()):
        pass


def test_a_removed_lock_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment between opening the file and locking it, in which its owner ends and removes it."""
    plain, removed = fcntl.flock, []

    def flock(file: object, how: int) -> None:
        if not removed:
            (tmp_path / LOCK).unlink()
            removed.append(True)
        plain(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_run(tmp_path, Ranks()):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
        with pytest.raises(InputError, match="another run writes"), only_run(tmp_path, Ranks()):
            pass
    assert removed
