"""Real servers on the loopback interface: in a process of its own, which can be killed, and in a thread of this one."""

import asyncio
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from gakernels import GenerativeAdapter
from gakernels.cli.serve import DEMO_CHAT_TEMPLATE
from gakernels.server.server import serve
from gakernels.server.settings import Settings


class ServerProcess:
    """`gakernels serve` with the models of the package, on any free port of 127.0.0.1."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "gakernels", "serve", "--folder", str(folder), "--port", "0", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = (folder.parent / "server.log").open("a+")
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("serving on http://127.0.0.1:"), self.read_log()
        self.url = line.removeprefix("serving on ").strip()

    @property
    def pid(self) -> int:
        return self._process.pid

    def client(self, **options: object) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def kill(self) -> None:
        """SIGKILL: the process has no chance to put anything in order."""
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """SIGTERM, and the exit code."""
        self._process.terminate()
        return self._process.wait(30)

    def read_log(self) -> str:
        self.log.seek(0)
        return self.log.read()


@contextmanager
def served(demo: GenerativeAdapter, folder: Path, **settings: Any) -> Iterator[str]:
    """The address of a server that runs in a thread of this process."""
    chosen = {"cpu_mebibytes": 1, "disk_mebibytes": 64, "threads": 1, "chat_template": DEMO_CHAT_TEMPLATE, **settings}
    addresses: queue.Queue[str] = queue.Queue()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    server = serve(demo, Settings(folder, "demo", **chosen), "127.0.0.1", 0, addresses.put, stop)
    thread = threading.Thread(target=loop.run_until_complete, args=[server])
    thread.start()
    try:
        yield addresses.get(timeout=60)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()
