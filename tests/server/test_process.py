"""What the server asks of the C library."""

import os
import platform
import subprocess
import sys

import pytest

from gakernels.server import process

ARENAS = """
import ctypes, runpy, sys, threading

runpy.run_path(sys.argv[1])["share_arenas"]()
libc, together = ctypes.CDLL(None), threading.Barrier(8)


def take() -> None:
    together.wait()
    libc.malloc(100)
    together.wait()


threads = [threading.Thread(target=take) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("settings", "arenas"),
    [({}, 2), ({"MALLOC_ARENA_MAX": "5"}, 5), ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=6"}, 6)],
    ids=["ours", "variable", "tunable"],
)
def test_threads_share_arenas_unless_the_user_says_otherwise(settings: dict[str, str], arenas: int) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", ARENAS, process.__file__]
    found = subprocess.run(command, env=kept | settings, capture_output=True, text=True, check=True).stdout
    assert found.count("<heap nr=") == arenas
