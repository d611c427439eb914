"""A real server on the loopback interface, in a process of its own, which can be killed."""

import os
import subprocess
import sys
from pathlib import Path

import httpx2


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
