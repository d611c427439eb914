"""The token cache: what it holds, when it is used again, and that no interruption harms it."""

import json
import logging
import os
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import own_progress_lock
from invented import make_tokenizer, random_text
from writing import drawn, json_lines, write

from gakernels import FormatError, InputError
from gakernels.data import BadRecords, FileSource, TokenCache, cache_writing, packed_segments, token_cache
from gakernels.data.caching import automatic_folder
from gakernels.data.documents import Document


def token_ids(text: str) -> list[int]:
    return [1, *[int(word[1:]) for word in text.split()], 2]


@pytest.fixture
def texts() -> list[str]:
    return [random_text(drawn(1, 30)) for _ in range(20)]


@pytest.fixture
def source(tmp_path: Path, texts: list[str]) -> FileSource:
    write(tmp_path / "data" / "a.jsonl", json_lines(texts[:-1]))
    write(tmp_path / "data" / "b.txt", texts[-1].encode())
    return FileSource(tmp_path / "data")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # some tests fork
    return tmp_path / "home"


def made(source: Any, folder: Path | None = None, **options: Any) -> TokenCache:
    return token_cache(source, make_tokenizer(), folder, progress=False, **options)


def tokens_of(cache: TokenCache) -> list[int]:
    return cache.corpus.read(0, cache.corpus.tokens).tolist()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_it_holds_the_tokens_of_all_documents_and_their_borders(
    tmp_path: Path, source: FileSource, texts: list[str]
) -> None:
    rows = [token_ids(text) for text in texts]
    cache = made(source, tmp_path / "cache")
    for opened in (cache, TokenCache.open(tmp_path / "cache")):
        assert tokens_of(opened) == [token for row in rows for token in row]
        assert opened.corpus.offsets.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
        assert opened.corpus.document_ids.tolist() == list(range(len(texts)))
        assert opened.largest_token == max(max(row) for row in rows)
        assert opened.bad_records.total == 0
    (tokens,) = (tmp_path / "cache").glob("*.tokens")
    assert tokens.stat().st_size == 2 * cache.corpus.tokens  # ids below 2^16 take two bytes
    segments = packed_segments(cache.corpus, 7)
    assert segments.take([3]).tolist() == [tokens_of(cache)[21:28]]


def test_a_vocabulary_beyond_16_bits_takes_four_bytes(tmp_path: Path, source: FileSource, texts: list[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"added{number}" for number in range(1 << 16)])
    write(tmp_path / "data" / "c.txt", b"w3 added65535")
    cache = token_cache(source, tokenizer, tmp_path / "cache", progress=False)
    largest = tokenizer.convert_tokens_to_ids("added65535")
    assert cache.largest_token == largest > 1 << 16
    assert tokens_of(cache) == [token for text in texts for token in token_ids(text)] + [1, 3, largest, 2]


@pytest.mark.parametrize("named", [True, False])
def test_it_is_used_again_where_nothing_has_changed(tmp_path: Path, source: FileSource, named: bool) -> None:
    folder = tmp_path / "cache" if named else None
    first = made(source, folder)
    before = files_of(first.folder)
    for path in (tmp_path / "data").iterdir():
        os.utime(path, (0, 0))  # the same contents
    assert made(source, folder).description == first.description
    assert files_of(first.folder) == before


def test_it_can_be_used_where_nothing_can_be_written(tmp_path: Path, source: FileSource) -> None:
    folder = made(source, tmp_path / "cache").folder
    (folder / ".lock").unlink()
    folder.chmod(0o500)
    try:
        made(source, folder)
        assert not (folder / ".lock").exists()
    finally:
        folder.chmod(0o700)


def test_the_automatic_folder_depends_on_place_key_and_tokenizer(source: FileSource, home: Path) -> None:
    other = make_tokenizer(eos=False)
    folders = {
        automatic_folder(source, make_tokenizer()),
        automatic_folder(source, other),
        automatic_folder(FileSource(source.path, "body"), other),
        automatic_folder(FileSource(source.path / "b.txt"), other),
    }
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {home / "gakernels" / "tokens"}
    assert made(source).folder == automatic_folder(source, make_tokenizer())


def test_a_changed_source_is_read_again_in_the_automatic_folder_and_refused_in_a_named_one(
    tmp_path: Path, source: FileSource, texts: list[str]
) -> None:
    made(source), made(source, tmp_path / "cache")
    before = files_of(tmp_path / "cache")
    write(tmp_path / "data" / "c.txt", b"w5 w6")
    again = made(source)
    assert tokens_of(again) == [token for text in [*texts, "w5 w6"] for token in token_ids(text)]
    assert len(list(again.folder.glob("*.tokens"))) == len(list(again.folder.glob("*.documents"))) == 1
    with pytest.raises(InputError, match=r"the token cache .*cache no longer matches .*data: c\.txt is new; remove"):
        made(source, tmp_path / "cache")
    assert files_of(tmp_path / "cache") == before


def test_a_cache_of_another_tokenizer_is_refused_with_both_names(tmp_path: Path, source: FileSource) -> None:
    made(source, tmp_path / "cache")
    before = files_of(tmp_path / "cache")
    other = make_tokenizer(eos=False)
    other.name_or_path = "some/model"
    with pytest.raises(
        InputError,
        match=r"was made with another tokenizer: no name \(64 tokens, .*\), but the model has some/model \(64 tok",
    ):
        token_cache(source, other, tmp_path / "cache", progress=False)
    assert files_of(tmp_path / "cache") == before


def test_bad_records_are_counted_kept_and_reported_each_time(
    tmp_path: Path, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    good, number = json_lines(texts), drawn(1, 9)
    path = write(tmp_path / "a.jsonl", good + b"no json\n" * number + good)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            cache = made(FileSource(path))
        assert tokens_of(cache) == 2 * [token for text in texts for token in token_ids(text)]
        assert cache.bad_records.counts == {"line that is not JSON": number}
        assert f"left out of {path}: {number} x line that is not JSON (first: line 21 of {path}" in caplog.text
    with pytest.raises(InputError, match=rf"records that can't be used: {number} x line that is not JSON"):
        made(FileSource(path), strict=True)


def test_hidden_files_are_reported_and_never_an_error(
    tmp_path: Path, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "texts"
    write(folder / "a.jsonl", json_lines(texts))
    hidden = write(folder / ".git" / "old.txt", b"w5 w6")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            cache = made(FileSource(folder), strict=True)
        assert tokens_of(cache) == [token for text in texts for token in token_ids(text)]
        assert f"left out of {folder}: 1 x file under a hidden name (first: {hidden})" in caplog.text


def test_with_strictness_the_first_bad_record_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines(["w3"]) + b"no json\n")
    with pytest.raises(InputError, match=r"data: line 2 of .*a\.jsonl: line that is not JSON"):
        made(FileSource(path), tmp_path / "cache", strict=True)
    assert files_of(tmp_path / "cache") == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"data: .*a\.jsonl holds no text that can be used$"),
        (
            json_lines(["w3"], key="body"),
            r"holds no text that can be used: 1 x record whose 'text' .*entries: id, body",
        ),
        (b"\x89PNG\r\n", r"holds no text that can be used: 1 x line that is not UTF-8"),
    ],
)
def test_a_source_without_a_usable_record_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path / "a.jsonl", data)
    with pytest.raises(InputError, match=message):
        made(FileSource(path), tmp_path / "cache")
    assert files_of(tmp_path / "cache") == {}
    with pytest.raises(InputError, match="data: there is no file or folder"):
        made(FileSource(tmp_path / "nowhere"), tmp_path / "cache")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    description = json.loads((folder / "cache.json").read_text())
    change(description)
    (folder / "cache.json").write_text(json.dumps(description))


def cut(folder: Path, suffix: str) -> None:
    (path,) = folder.glob(f"*{suffix}")
    path.write_bytes(path.read_bytes()[:-2])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tokens cut off": (lambda folder: cut(folder, ".tokens"), r"\.tokens is damaged: it must have .* but it has"),
    "documents cut off": (lambda folder: cut(folder, ".documents"), r"\.documents is damaged: it must have"),
    "tokens missing": (lambda folder: next(folder.glob("*.tokens")).unlink(), r"\.tokens .* but it is missing"),
    "other borders": (
        lambda folder: next(folder.glob("*.documents")).write_bytes(bytes(8 * 21)),
        r"\.documents is damaged: it must lead from 0 to",
    ),
    "no json": (lambda folder: (folder / "cache.json").write_text('{"kind'), r"cache\.json is damaged: it is not JSON"),
    "other json": (lambda folder: (folder / "cache.json").write_text("[]"), "does not describe a token cache"),
    "newer": (lambda folder: rewrite(folder, lambda d: d.update(format_version=2)), "has format version 2, and this"),
    "no count": (lambda folder: rewrite(folder, lambda d: d.pop("tokens")), "it has no entry 'tokens'"),
    "odd type": (lambda folder: rewrite(folder, lambda d: d.update(dtype="<f4")), "'dtype' must be one of"),
    "no source": (lambda folder: rewrite(folder, lambda d: d.pop("source")), "it has no entry 'source'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_refused_and_an_automatic_one_made_anew(
    tmp_path: Path, source: FileSource, damage: str
) -> None:
    harm, message = DAMAGE[damage]
    expected = tokens_of(made(source))
    made(source, tmp_path / "cache")
    harm(tmp_path / "cache")
    harm(automatic_folder(source, make_tokenizer()))
    for use in (lambda: made(source, tmp_path / "cache"), lambda: TokenCache.open(tmp_path / "cache")):
        with pytest.raises(FormatError, match=message):
            use()
    assert tokens_of(made(source)) == expected


def test_no_cache_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no token cache in .*nowhere"):
        TokenCache.open(tmp_path / "nowhere")


@dataclass(frozen=True)
class Invented:
    """A source of any size that keeps nothing; what it holds changes with `version`."""

    count: int
    version: int = 0
    log: Path | None = None
    name: str = "invented"
    identity: str = "invented"

    def documents(self, bad: BadRecords) -> Iterator[Document]:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()}\n")
        for number in range(self.count):
            yield iter([f"w{3 + (number + self.version) % 60} w5\n" * 20])

    def description(self) -> dict[str, Any]:
        return {"count": self.count, "version": self.version}

    def change(self, description: Any) -> str | None:
        return None if description == self.description() else "it is another one"

    def tokens(self) -> list[int]:
        rows = ([1, *[3 + (number + self.version) % 60, 5] * 20, 2] for number in range(self.count))
        return [token for row in rows for token in row]


def in_a_process(work: Callable[[], object]) -> int:
    """Runs it in a fork of this process, which never comes back to pytest. The process's id."""
    pid = os.fork()
    if pid == 0:
        try:
            own_progress_lock()
            work()
        finally:
            os._exit(0)
    return pid


def assert_unharmed(old: Invented, folder: Path) -> None:
    """What is there is either the whole old cache or the whole new one, and the next that is written is alone there."""
    cache, new, newer = TokenCache.open(folder), Invented(old.count, version=1), Invented(old.count, version=2)
    assert tokens_of(cache) == (old if cache.description["source"]["version"] == 0 else new).tokens()
    assert tokens_of(made(newer)) == newer.tokens()
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".documents", ".json", ".tokens"]


def test_a_process_killed_at_any_moment_harms_no_cache() -> None:
    old = Invented(1500)
    start = time.monotonic()
    folder = made(old).folder
    duration = time.monotonic() - start
    for _ in range(6):
        made(old)
        pid = in_a_process(lambda: made(Invented(1500, version=1)))
        time.sleep(float(torch.rand(())) * duration * 1.2)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert_unharmed(old, folder)


DECISIVE = ["os.fsync", "pathlib.Path.replace", "json.dumps", "pathlib.Path.unlink"]


@pytest.mark.parametrize("name", DECISIVE)
def test_a_process_killed_at_a_decisive_moment_harms_no_cache(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    old = Invented(40)
    folder = made(old).folder
    for call in range(4):
        made(old)

        def killed(call: int = call) -> None:
            at_call(monkeypatch, name, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
            made(Invented(40, version=1))

        os.waitpid(in_a_process(killed), 0)
        assert_unharmed(old, folder)


def test_a_process_killed_amid_the_description_harms_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Invented(40)
    folder = made(old).folder

    def half(path: Path, text: str, **options: Any) -> None:
        path.write_bytes(text.encode()[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        monkeypatch.setattr(Path, "write_text", half)
        made(Invented(40, version=1))

    os.waitpid(in_a_process(killed), 0)
    assert list(folder.glob(".cache.json.*.tmp"))  # it was
    assert_unharmed(old, folder)


@pytest.mark.parametrize("name", DECISIVE[:-1])
def test_an_interruption_by_the_user_harms_no_cache(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    old = Invented(40)
    folder = made(old).folder

    def interrupt() -> None:
        raise KeyboardInterrupt

    for call in range(4):
        made(old)
        with monkeypatch.context() as patch:
            at_call(patch, name, call, interrupt)
            with suppress(KeyboardInterrupt):
                made(Invented(40, version=1))
        assert len(list(folder.glob("*.tokens"))) == 1
        assert_unharmed(old, folder)


def at_call(monkeypatch: pytest.MonkeyPatch, name: str, call: int, event: Callable[[], object]) -> None:
    """Something happens when the function has been called for the time `call`, counted from 0."""
    module, _, attribute = name.rpartition(".")
    owner = {"os": os, "json": json, "pathlib.Path": Path}[module]
    plain, calls = getattr(owner, attribute), iter(range(2 * call + 1))

    def watched(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) == 2 * call:
            event()  # before it does its work
        result = plain(*arguments, **options)
        if next(calls, None) == 2 * call:
            event()
        return result

    monkeypatch.setattr(owner, attribute, watched)


def test_an_error_while_writing_leaves_the_old_cache_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Invented(2000)
    folder = made(old).folder
    before = files_of(folder)
    plain, calls = cache_writing._Writer.add, iter(range(drawn(0, 2)))  # of two blocks

    def full(*arguments: Any) -> None:
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        plain(*arguments)

    monkeypatch.setattr(cache_writing._Writer, "add", full)
    with pytest.raises(OSError, match=f"written to {folder}: No space left on device; data.cache"):
        made(Invented(2000, version=1))
    assert files_of(folder) == before


@pytest.mark.parametrize("suffix", [".tokens", ".documents"])
def test_numbers_that_have_changed_on_the_disk_are_never_used(tmp_path: Path, suffix: str) -> None:
    """In a named folder they are an error, in the automatic one they are made again."""
    for folder in (tmp_path / "named", None):
        cache = made(Invented(300), folder)
        right, (path,) = tokens_of(cache), cache.folder.glob(f"*{suffix}")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1 << drawn(0, 7)
        path.write_bytes(data)
        if folder is None:
            assert tokens_of(made(Invented(300))) == right
        else:
            with pytest.raises(FormatError, match=f"{cache.folder} is damaged: its numbers do not match the checksum"):
                made(Invented(300), folder)


@pytest.mark.parametrize("named", [True, False])
def test_a_cache_that_can_not_be_written_says_what_to_do(tmp_path: Path, home: Path, named: bool) -> None:
    """Where the folder of the caches can't be made, whoever one is."""
    home.write_text("no folder")
    folder = home / "mine" if named else None
    with pytest.raises(OSError, match=f"token cache can't be written to {home}/.*data.cache.*XDG_CACHE_HOME") as error:
        made(Invented(3), folder)
    assert "\n" not in str(error.value)
    assert made(Invented(3), tmp_path / "elsewhere").corpus.tokens  # as the message says


def test_a_user_without_a_home_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(InputError, match="no home folder for the cache of tokens; XDG_CACHE_HOME"):
        made(Invented(3))
    assert made(Invented(3), tmp_path / "elsewhere").corpus.tokens


def test_what_goes_wrong_with_the_source_is_not_said_of_the_cache(tmp_path: Path) -> None:
    class Vanishing(Invented):
        def documents(self, bad: Any) -> Any:
            yield from Invented(3).documents(bad)
            (tmp_path / "gone.txt").read_text()

    with pytest.raises(FileNotFoundError, match=r"gone\.txt") as error:
        made(Vanishing(3))
    assert "token cache" not in str(error.value)


def test_of_several_processes_one_writes_and_the_others_wait(tmp_path: Path) -> None:
    source = Invented(3000, log=tmp_path / "log")

    def use(number: int) -> None:
        (tmp_path / f"{number}.json").write_text(json.dumps(tokens_of(made(source))))

    for pid in [in_a_process(lambda number=number: use(number)) for number in range(3)]:  # type: ignore[misc]
        os.waitpid(pid, 0)
    assert [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(3)] == [source.tokens()] * 3
    assert len((tmp_path / "log").read_text().split()) == 1


def peak(source: Invented, folder: Path) -> int:
    tracemalloc.start()
    try:
        made(source, folder)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    small, large = peak(Invented(2200), tmp_path / "small"), peak(Invented(6600), tmp_path / "large")
    assert large < 1.2 * small
