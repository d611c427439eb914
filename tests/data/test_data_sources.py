"""Sources: files and data sets of the hub."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from invented import random_text
from writing import drawn, json_lines, write

from gakernels import InputError
from gakernels.data import BadRecords, FileSource, HubSource, Source, source_of


def documents(source: Source) -> tuple[list[str], BadRecords]:
    bad = BadRecords()
    return ["".join(pieces) for pieces in source.documents(bad)], bad


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data" / "a.txt", random_text(30).encode())
    write(tmp_path / "data" / "sub" / "b.jsonl.gz", json_lines([random_text(5) for _ in range(4)]))
    return tmp_path / "data"


def test_a_folder_gives_the_documents_of_its_files_in_their_order(folder: Path) -> None:
    found, bad = documents(FileSource(folder))
    assert found[0] == (folder / "a.txt").read_text()
    assert (len(found), bad.total) == (5, 0)
    assert documents(FileSource(folder / "a.txt"))[0] == found[:1]


def test_the_same_files_elsewhere_are_the_same_source(folder: Path, tmp_path: Path) -> None:
    description = json.loads(json.dumps(FileSource(folder).description()))
    assert FileSource(folder).change(description) is None
    moved = folder.rename(tmp_path / "moved")
    for path in moved.rglob("*.*"):
        os.utime(path, (0, 0))
    assert FileSource(moved).change(description) is None
    assert FileSource(moved).identity != FileSource(folder).identity


def test_every_change_of_the_files_is_told(folder: Path) -> None:
    source = FileSource(folder)
    description = source.description()
    text = folder / "a.txt"
    content = text.read_bytes()
    text.write_bytes(content[::-1])
    assert source.change(description) == "a.txt has other contents"
    text.write_bytes(content + b"w3\n")
    assert source.change(description) == f"a.txt has {len(content) + 3} bytes instead of {len(content)}"
    text.write_bytes(content)
    assert source.change(description) is None
    write(folder / "sub" / "c.md", b"w3")
    assert source.change(description) == "sub/c.md is new"
    (folder / "sub" / "c.md").unlink()
    text.unlink()
    assert source.change(description) == "a.txt is missing"


def test_another_key_or_kind_is_another_source(folder: Path) -> None:
    description = FileSource(folder).description()
    assert FileSource(folder, "body").change(description) == "its texts are not the entries 'body' of files"
    hub = HubSource("some/data").description()
    assert FileSource(folder).change(hub) == "its texts are not the entries 'text' of files"
    assert HubSource("some/data").change(description) == "kind was 'files' and is 'hub'"
    assert HubSource("some/data", split="test").change(hub) == "split was 'train' and is 'test'"
    assert HubSource("some/data").change(json.loads(json.dumps(hub))) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("texts/a:b", FileSource(Path("texts/a:b"), "body")),
        ("hub:me/data", HubSource("me/data", text_key="body")),
        ("hub:me/data:test", HubSource("me/data", split="test", text_key="body")),
        ("hub:me/data:en:train[:10%]", None),
        ("hub:me/data:en:validation", HubSource("me/data", "en", "validation", "body")),
        ("hub:me/data@v2", HubSource("me/data", text_key="body", revision="v2")),
        ("hub:me/data@v2:en:test", HubSource("me/data", "en", "test", "body", "v2")),
        ("hub:", None),
        ("hub:me/data:", None),
    ],
)
def test_a_source_is_named_by_a_text(text: str, expected: Source | None) -> None:
    if expected is None:
        with pytest.raises(InputError, match=r"data must be a path, hub:dataset, .* but it is 'hub:"):
            source_of(text, "body")
    else:
        assert source_of(text, "body") == expected
        assert source_of(text, "body").name == (
            f"{text}:train" if text.count(":") == 1 and text.startswith("hub:") else text
        )


class Rows(list[dict[str, Any]]):
    """What the library gives as a stream."""

    def take(self, count: int) -> list[dict[str, Any]]:
        return self[:count]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the package datasets; what it was asked for."""
    calls: list[Any] = []

    class DatasetsError(Exception):
        pass

    def load_dataset(*arguments: Any, **options: Any) -> Rows:
        calls.append((arguments, options))
        if arguments[0] == "me/nowhere":
            raise DatasetsError("no such data set")
        return Rows([{"body": "w3 w4"}, {"body": None}, {"body": "w5"}, {"body": ""}])

    package = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError))
    monkeypatch.setitem(sys.modules, "datasets", package)  # type: ignore[arg-type]
    return calls


def test_a_data_set_of_the_hub_is_read_as_a_stream(asked: list[Any]) -> None:
    found, bad = documents(HubSource("me/data", "en", "test", "body", revision="v2"))
    assert found == ["w3 w4", "w5"]
    assert bad.places == {"record whose 'body' entry is not text": ["row 2 of hub:me/data@v2:en:test (entries: body)"]}
    assert asked == [(("me/data", "en"), {"split": "test", "revision": "v2", "streaming": True})]
    assert documents(HubSource("me/data", text_key="body", limit=2))[0] == ["w3 w4"]


def test_a_data_set_that_can_not_be_had_is_told(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="data: hub:me/nowhere:train can't be read: no such data set"):
        documents(HubSource("me/nowhere"))
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"needs the package datasets: pip install 'gakernels\[hub\]'"):
        documents(HubSource("me/data"))


def test_the_library_itself_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [random_text(drawn(1, 20)) for _ in range(6)]
    write(tmp_path / "set" / "test.jsonl", json_lines([*texts, None], key="body"))
    source = HubSource(str(tmp_path / "set"), split="test", text_key="body")
    found, bad = documents(source)
    assert (found, list(bad.counts.values())) == (texts, [1])
    assert documents(HubSource(str(tmp_path / "set"), split="test", text_key="body", limit=4))[0] == texts[:4]
    with pytest.raises(InputError, match=r"data: hub:.*:train can't be read: .*train"):
        documents(HubSource(str(tmp_path / "set"), text_key="body"))
    with pytest.raises(InputError, match=r"data: hub:.*nowhere:train can't be read"):
        documents(HubSource(str(tmp_path / "nowhere")))
