"""What a server needs of its process: files for its connections, and memory that does not grow with its threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource

_FILES = 1024  # besides connections
_M_ARENA_MAX, _ARENAS = -8, 2  # malloc.h


def allow_files(connections: int) -> None:
    """Let this process open as many connections and other files as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def share_arenas() -> None:
    """Make all threads share a few memory arenas, if the C library is glibc.

    By default each thread gets its own, and no other thread can use what it has freed there, so a server that was busy
    for hours holds a multiple of what it needs. Settings of the user in the environment take precedence.
    """
    if "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc.arena_max" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)
