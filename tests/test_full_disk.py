"""A disk that is full or read-only, under everything that the library writes: the last good state is kept."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from limits import Disk
from writers import KINDS, Writers, contents, write


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Writers:
    return Writers(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.mark.parametrize("free", [0, Disk.PAGE])
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk(writers: Writers, disk: Disk, kind: str, free: int) -> None:
    write(writers, kind, disk.folder, new=False)
    before = contents(disk.folder)
    assert before
    with disk.full(free), pytest.raises(OSError, match=str(disk.folder)) as caught:
        write(writers, kind, disk.folder, new=True)
    assert "\n" not in str(caught.value)
    assert contents(disk.folder) == before
    write(writers, kind, disk.folder, new=True)
    assert contents(disk.folder) != before


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_only_disk(writers: Writers, disk: Disk, kind: str) -> None:
    write(writers, kind, disk.folder, new=False)
    before = contents(disk.folder)
    with disk.read_only(), pytest.raises(OSError, match=rf"Read-only file system.*{disk.folder}|{disk.folder}.*Read-"):
        write(writers, kind, disk.folder, new=True)
    assert contents(disk.folder) == before
