"""Files to documents."""

import codecs
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from invented import random_text
from writing import COMPRESSORS, drawn, json_lines, write

from gakernels import InputError
from gakernels.data import BadRecords, find_files
from gakernels.data.documents import PIECE, file_documents, pieces_of


def documents(path: Path, text_key: str = "text") -> tuple[list[str], BadRecords]:
    bad = BadRecords()
    return ["".join(pieces) for pieces in file_documents(path, text_key, bad)], bad


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    text = random_text(30) + "äöü \u4e16\u754c\r\n"
    path = write(tmp_path / f"notes.v2.txt{suffix}", text.encode())
    found, bad = documents(path)
    assert (found, bad.total) == ([text.replace("\r\n", "\n")], 0)


def test_the_text_of_each_record_is_a_document(tmp_path: Path) -> None:
    texts = [random_text(drawn(1, 30)) for _ in range(5)]
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet")
    for path in (write(tmp_path / "a.jsonl.gz", json_lines(texts, key="body")), tmp_path / "a.parquet"):
        found, bad = documents(path, text_key="body")
        assert (found, bad.total) == (texts, 0)


def test_blank_texts_are_left_out_and_are_not_bad(tmp_path: Path) -> None:
    for name, data, expected in (
        ("a.jsonl", json_lines(["w3", " \n", "", "w4"]), ["w3", "w4"]),
        ("b.txt", b" \n\t\n", []),
        ("c.txt.gz", b"", []),
        ("d.jsonl", b"\n\n", []),
    ):
        found, bad = documents(write(tmp_path / name, data))
        assert (found, bad.total) == (expected, 0)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.txt", codecs.BOM_UTF8 + b"w3"))[0] == ["w3"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "record whose 'text' entry is not text"),
        (["w3"], "record whose 'text' entry is not text"),
        ("w3 \0 w4", "text with NUL bytes"),
        ("w3 \ud800", "text with half of a surrogate pair"),
    ],
)
def test_a_record_without_a_proper_text_is_counted(tmp_path: Path, value: object, kind: str) -> None:
    before = drawn(0, 5)
    path = write(tmp_path / "a.jsonl", json_lines(["w3"] * before + [value, "w4"]))
    found, bad = documents(path)
    assert found == ["w3"] * before + ["w4"]
    assert bad.counts == {kind: 1}
    assert bad.places[kind][0].startswith(f"line {before + 1} of {path}")


def test_records_under_another_key_are_counted_with_the_keys_they_have(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines(["w3"] * 5, key="body"))
    found, bad = documents(path)
    assert found == []
    assert bad.counts == {"record whose 'text' entry is not text": 5}
    assert bad.places["record whose 'text' entry is not text"][0] == f"line 1 of {path} (entries: id, body)"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"w3 \0 w4", r"file with NUL bytes \(not a text\?\)"),
        ("größe".encode("latin-1"), "text file that is not UTF-8"),
        (b"w3 \xe4", "text file that is not UTF-8"),
    ],
)
def test_a_file_that_is_no_text_is_counted_wherever_the_fault_is(tmp_path: Path, data: bytes, kind: str) -> None:
    path = write(tmp_path / "a.txt", random_text(drawn(1, 50_000)).encode() + data)
    found, bad = documents(path)
    assert found == []
    assert bad.places == {kind.replace("\\", ""): [str(path)]}
    with pytest.raises(InputError, match=rf"data: .*a\.txt: {kind}"):
        list(file_documents(path, "text", BadRecords(strict=True)))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_a_truncated_text_file_is_left_out_as_a_whole(tmp_path: Path, suffix: str) -> None:
    data = COMPRESSORS[suffix](random_text(1000).encode())
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: drawn(len(data) // 4, len(data) - 8)])
    found, bad = documents(path)
    assert (found, bad.counts) == ([], {"file that can't be read to its end": 1})


def test_pieces_make_up_the_document() -> None:
    text = random_text(500)
    pieces = list(pieces_of(text, size=drawn(1, 300)))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert all(piece.endswith("\n") for piece in pieces)


def test_a_document_without_line_ends_is_one_piece() -> None:
    text = random_text(500).replace("\n", " ")
    assert list(pieces_of(text, size=100)) == [text]


def test_a_text_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    line = random_text(100)
    path = tmp_path / "a.txt"
    path.write_text(line * (8 * (1 << 20) // len(line)))
    (document,) = list(file_documents(path, "text", BadRecords()))
    tracemalloc.start()
    try:
        sizes = [len(piece) for piece in document]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sizes) == path.stat().st_size
    assert max(sizes) < PIECE + 200
    assert peak < path.stat().st_size / 8


def test_a_folder_gives_its_data_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = [
        "b.txt",
        "a.md",
        "sub/c.jsonl.gz",
        "sub/d.text.xz",
        "sub/deep/e.ndjson",
        "z.txt.bz2",
        "p.parquet",
        "q.jsonl.zst",
    ]
    for name in [*names, "model.safetensors", "image.png", "archive.gz", "notes.txt.zip"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(4))
    assert find_files(tmp_path) == sorted(tmp_path / name for name in names)


def test_a_file_given_directly_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    for name in ("README", "report.2024", "code.py"):
        path = tmp_path / name
        path.write_text(f"{name}\nw3")
        assert find_files(path) == [path]
        assert documents(path)[0] == [f"{name}\nw3"]


HIDDEN = [".ipynb_checkpoints/a-checkpoint.txt", "sub/.git/objects/x.md", "sub/.draft.jsonl", ".old/deep/down/b.txt.gz"]


def test_files_under_hidden_names_are_left_out_and_counted(tmp_path: Path) -> None:
    for name in ["a.txt", "sub/b.txt", *HIDDEN, ".DS_Store"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("w3")
    bad = BadRecords(strict=True)  # they are no fault
    assert find_files(tmp_path, bad=bad) == [tmp_path / "a.txt", tmp_path / "sub" / "b.txt"]
    assert bad.counts == {"file under a hidden name": 4}
    assert bad.places["file under a hidden name"] == [str(tmp_path / name) for name in sorted(HIDDEN)[:3]]


def test_a_hidden_place_that_is_named_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".hidden"
    (folder / "sub").mkdir(parents=True)
    for name in ("sub/a.txt", ".b.txt"):
        (folder / name).write_text("w3")
    assert find_files(folder) == [folder / "sub" / "a.txt"]
    assert find_files(folder / ".b.txt") == [folder / ".b.txt"]
    monkeypatch.chdir(folder)
    assert find_files(Path("../.hidden")) == [Path("../.hidden/sub/a.txt")]
    assert find_files(Path()) == [Path("sub/a.txt")]


def test_a_folder_with_nothing_but_hidden_files_says_so(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("w3")
    with pytest.raises(InputError, match=r"holds no file that ends in .* behind it\), but 1 under hidden names"):
        find_files(tmp_path)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data: there is no file or folder .*nowhere"):
        find_files(tmp_path / "nowhere")


def test_a_folder_without_data_lists_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    with pytest.raises(
        InputError, match=r"data: .* holds no file that ends in \.jsonl, \.md.*or \.gz.*\.zst behind it"
    ):
        find_files(tmp_path)
