"""Files as people have them: links, pipes and devices as outputs, and the modes that users gave."""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import code_of
from tiny import make_model, random_context, same_adapters
from writers import KINDS, Writers, contents, write

from gakernels import Adapter, InputError
from gakernels.files import replacing, write_text


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Writers:
    return Writers(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return make_model().adapt(random_context(9))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("value", [0o022, 0o027, 0o077, 0o002])
@pytest.mark.parametrize("kind", KINDS)
def test_new_files_have_the_mode_that_the_umask_gives(writers: Writers, tmp_path: Path, kind: str, value: int) -> None:
    with umask(value):
        write(writers, kind, tmp_path / "new", new=False)
    written = [path for path in (tmp_path / "new").rglob("*") if path.name not in ("lock", ".lock")]
    assert {mode(path) for path in written if path.is_file()} == {0o666 & ~value}
    assert {mode(path) for path in written if path.is_dir()} <= {0o777 & ~value}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("checkpoint", "cache")])  # always new files
def test_an_existing_file_keeps_its_mode(writers: Writers, tmp_path: Path, kind: str) -> None:
    write(writers, kind, tmp_path, new=False)
    before, modes = contents(tmp_path), {}
    for number, name in enumerate(before):
        modes[name] = [0o640, 0o600, 0o664, 0o444][number % 4]
        (tmp_path / name).chmod(modes[name])
    if kind in ("log", "answers"):  # which are appended to
        modes = dict.fromkeys(modes, 0o640)
        (tmp_path / next(iter(modes))).chmod(0o640)
    write(writers, kind, tmp_path, new=True)
    assert contents(tmp_path) != before
    assert {name: mode(tmp_path / name) for name in before} == modes


def test_nobody_reads_a_private_file_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "private"
    path.touch(mode=0o600)
    with replacing(path) as temporary:
        assert mode(temporary) == 0o600
        temporary.write_text("secret")
    assert (mode(path), path.read_text()) == (0o600, "secret")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(adapter: Adapter, tmp_path: Path, there: bool) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "far").mkdir()
    target, second, link = tmp_path / "far" / "a.st", tmp_path / "far" / "link", tmp_path / "here" / "a.st"
    if there:
        target.write_text("old")
        target.chmod(0o640)
    second.symlink_to("a.st")
    link.symlink_to(Path("..") / "far" / "link")
    adapter.save(link)
    assert (str(link.readlink()), str(second.readlink())) == ("../far/link", "a.st")
    assert same_adapters(Adapter.load(target), adapter)
    assert not there or mode(target) == 0o640
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.st", "a.st", "link"]


def test_a_link_to_a_folder_and_links_in_a_folder_stay(adapter: Adapter, tmp_path: Path) -> None:
    other = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path  # another file system, where there is one
    far = other / f"{tmp_path.name}-{os.getpid()}.safetensors"
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "adapter_model.safetensors").symlink_to(far)
    (tmp_path / "link").symlink_to("real")
    try:
        adapter.save_peft(tmp_path / "link")
        assert far.stat().st_size > 1000
    finally:
        far.unlink(missing_ok=True)
    assert (tmp_path / "link").is_symlink()
    names = {path.name: path.is_symlink() for path in (tmp_path / "real").iterdir()}
    assert names == {"adapter_config.json": False, "adapter_model.safetensors": True}


def test_a_link_to_itself_is_named(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=f"Too many levels of symbolic links: '{tmp_path / 'a'}'"):
        adapter.save(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


def test_a_pipe_is_written_to(adapter: Adapter, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    adapter.save(pipe)
    reader.join()
    assert pipe.is_fifo()
    (tmp_path / "copy").write_bytes(received[0])
    assert same_adapters(Adapter.load(tmp_path / "copy"), adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "pipe"]


def test_a_device_is_written_to_and_never_replaced(adapter: Adapter, tmp_path: Path) -> None:
    before = Path("/dev/null").stat()
    adapter.save("/dev/null")
    pytest.importorskip("gguf")
    adapter.save_gguf("/dev/null")
    after = Path("/dev/null").stat()
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        adapter.save("/dev/full")
    with pytest.raises(InputError, match="/dev/null is a device or pipe, so no folder can be written"):
        adapter.save_peft("/dev/null")


def test_the_standard_output_is_gone_on_with(tmp_path: Path) -> None:
    """Also where it is a file that holds something already: opened anew, it would be written over."""

    def print_three() -> None:
        print("first", flush=True)
        write_text(Path("/dev/stdout"), "second\n")
        print("third")

    for opened_for in ("w", "a"):
        with (tmp_path / "out").open(opened_for) as out:
            assert code_of(print_three, out.fileno(), 2) == 0
    assert (tmp_path / "out").read_text() == "first\nsecond\nthird\n" * 2


def test_a_name_as_long_as_a_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)
    write_text(path, "text")
    assert path.read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 1
