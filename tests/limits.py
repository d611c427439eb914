"""Failures of the machine, made to order."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more to a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Disk:
    """A file system of 1 MiB of one's own, where this process may mount one, else a folder.

    Attributes:
        folder: on it.
    """

    PAGE = 4096

    def __init__(self, place: Path) -> None:
        self._place = place
        place.mkdir()
        self.mounted = os.geteuid() == 0 and self._call("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place))
        self.folder = place / "files"
        self.folder.mkdir()

    def close(self) -> None:
        if self.mounted and not self._call("umount", str(self._place)):
            self._call("umount", "--lazy", str(self._place))
            raise AssertionError("a file is still open")

    @contextmanager
    def full(self, free: int) -> Iterator[None]:
        """Only so many bytes are free; without a file system of one's own, that many can be written to each file."""
        if not self.mounted:
            with files_of_at_most(free):
                yield
            return
        filler = self._place / "filler"
        left = os.statvfs(self._place)
        filler.write_bytes(bytes(left.f_bavail * left.f_bsize - free))
        try:
            yield
        finally:
            filler.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written."""
        if not self.mounted:
            pytest.skip("no file system can be mounted here")
        assert self._call("mount", "-o", "remount,ro", str(self._place))
        try:
            yield
        finally:
            assert self._call("mount", "-o", "remount,rw", str(self._place))

    def _call(self, *command: str) -> bool:
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False
