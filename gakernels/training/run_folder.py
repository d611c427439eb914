"""The folder of a run: one run at a time writes there."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gakernels.distributed import Ranks
from gakernels.errors import InputError

LOCK = "lock"


@contextmanager
def only_run(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep every other run out of a folder, which is made if it is not there, and goes if it stays empty.

    Raises:
        InputError: another run is there.
    """
    if ranks.rank > 0:
        yield
        return
    try:
        with only_process(folder / LOCK, f"another run writes to {folder}", "name another folder"):
            yield
    finally:
        with suppress(OSError):  # there is something in it
            folder.rmdir()


@contextmanager
def only_process(lock: Path, taken: str, instead: str) -> Iterator[None]:
    """Keep every other process out that asks for the same lock, a file that is made for it and removed in the end.

    The lock is the operating system's, so it goes with its process, however that ends: a file that was left behind
    means nothing. On network file systems it holds as far as they pass locks on (NFS from version 4).

    Args:
        lock: the file.
        taken: what to say of another process.
        instead: what the user could do besides waiting for its end.

    Raises:
        InputError: another process has it.
        OSError: the file can't be written or locked.
    """
    with _locked(lock, taken, instead) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(path: Path, taken: str, instead: str) -> IO[str]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read().strip() or "process unknown"
            raise InputError(f"{taken} ({holder}); wait for its end, or {instead}") from error
        except OSError as error:
            file.close()
            raise OSError(error.errno, error.strerror, str(path)) from error
        # Whoever had it until now may have removed the file since it was opened: then it keeps nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()
