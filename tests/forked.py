"""For tests that need a process of their own, without the seconds that a new one takes."""

import os
import sys
import threading
import traceback
from collections.abc import Callable

from tqdm import tqdm


def own_progress_lock() -> None:
    """Call it in the fork: progress bars share a lock, and one killed while it holds the lock would stop all others."""
    tqdm.set_lock(threading.RLock())


def code_of(call: Callable[[], object], stdout: int, stderr: int) -> int:
    """Call it in a fork with these open files; gives its exit code: what the call returns (None for 0)."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    try:
        own_progress_lock()
        for number, own in ((1, stdout), (2, stderr)):
            os.dup2(own, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        try:
            code = int(call() or 0)  # type: ignore[call-overload]
        except SystemExit as end:
            code = int(end.code or 0)
        sys.stdout.flush()  # as Python does at its end
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
