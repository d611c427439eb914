"""The folder of a run: one run at a time writes there."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gakernels.errors import InputError
from gakernels.training.parallel import Ranks

LOCK = "lock"


@contextmanager
def only_run(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep every other run out of a folder, which is made if it is not there, and goes if it stays empty.

    The lock is the operating system's, so it goes with its process, however that ends: a file that was left behind
    means nothing. On network file systems it holds as far as they pass locks on (NFS from version 4).

    Raises:
        InputError: another run is there.
    """
    if ranks.rank > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise InputError(
                f"another run writes to {folder} ({file.read().strip() or 'process unknown'}); wait for its end, or "
                "name another folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if not any(folder.iterdir()):  # the run refused to begin
                folder.rmdir()
