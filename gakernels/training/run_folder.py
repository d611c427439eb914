"""The folder of a run: only one run at a time writes to it."""

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
    """Keep all other runs out of a folder. It is created if it does not exist, and removed if it stays empty.

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
        with suppress(OSError):  # it is not empty
            folder.rmdir()


@contextmanager
def only_process(lock: Path, taken: str, instead: str) -> Iterator[None]:
    """Keep out all other processes that use the same lock: a file that is created for it and removed at the end.

    The operating system holds the lock and releases it when the process ends, for whatever reason, so a leftover file
    means nothing. Network file systems must support locks (NFS from version 4).

    Args:
        lock: the file.
        taken: the message about the other process.
        instead: what the user can do instead of waiting.

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
            raise InputError(f"{taken} ({holder}); wait until it ends, or {instead}") from error
        except OSError as error:
            file.close()
            raise OSError(error.errno, error.strerror, str(path)) from error
        # Its last holder may have removed the file since it was opened; then it locks nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()
