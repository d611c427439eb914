"""Text files to documents: what is read, and how what can't be read is told."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from invented import random_text

from gakernels import InputError
from gakernels.training.data import find_files, read_documents

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def lines_of(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(texts)).encode()


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    text = random_text(30) + "äöü \u4e16\u754c\r\n"
    path = tmp_path / f"notes.v2.txt{suffix}"
    path.write_bytes(COMPRESSORS[suffix](text.encode()))
    assert list(read_documents(path)) == [text.replace("\r\n", "\n")]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson"])
def test_each_line_of_a_json_lines_file_is_a_document(tmp_path: Path, kind: str, suffix: str) -> None:
    texts = [random_text(int(torch.randint(1, 30, ()))) for _ in range(5)]
    path = tmp_path / f"notes{kind}{suffix}"
    path.write_bytes(COMPRESSORS[suffix](lines_of(texts[:2]) + b"\n  \n" + lines_of(texts[2:])))
    assert list(read_documents(path)) == texts


def test_another_key_can_hold_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(["w3"], key="body"))
    assert list(read_documents(path, text_key="body")) == ["w3"]


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(["w3", " \n", "", "w4"]))
    assert list(read_documents(path)) == ["w3", "w4"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (lines_of(["w3"]) if name == "a.jsonl" else b"w3"))
    assert list(read_documents(tmp_path / name)) == ["w3"]


def test_a_folder_gives_its_text_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = ["b.txt", "a.md", "sub/c.jsonl.gz", "sub/d.text.xz", "sub/deep/e.ndjson", "z.txt.bz2"]
    for name in [*names, "model.safetensors", "image.png", "archive.gz", "notes.txt.zip"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(4))
    found = find_files(tmp_path)
    assert found == sorted(tmp_path / name for name in names)


def test_a_file_given_directly_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    for name in ("README", "report.2024", "code.py"):
        path = tmp_path / name
        path.write_text(f"{name}\nw3")
        assert find_files(path) == [path]
        assert list(read_documents(path)) == [f"{name}\nw3"]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data: there is no file or folder .*nowhere"):
        find_files(tmp_path / "nowhere")


def test_a_folder_without_text_files_lists_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    with pytest.raises(InputError, match=r"data: .* holds no file that ends in \.jsonl, \.md.*or \.gz"):
        find_files(tmp_path)


NOT_TEXT = {
    "empty.txt": (b"", r"data: .*empty\.txt is empty"),
    "blank.txt": (b" \n\t\n", r"data: .*blank\.txt is empty"),
    "blank.jsonl": (b"\n\n", r"data: .*blank\.jsonl is empty"),
    "empty.txt.gz": (gzip.compress(b""), r"data: .*empty\.txt\.gz is empty"),
    "nul.txt": (b"w3 \0 w4", r"data: .*nul\.txt must be text, but it holds NUL bytes"),
    "latin.txt": ("größe".encode("latin-1"), r"data: .*latin\.txt must be UTF-8 text.*0xf6"),
    "latin.jsonl": ('{"text": "größe"}'.encode("latin-1"), r"data: .*latin\.jsonl must be UTF-8 text"),
    "plain.txt.gz": (b"not compressed", r"data: .*plain\.txt\.gz can't be read"),
    "plain.txt.xz": (b"not compressed", r"data: .*plain\.txt\.xz can't be read"),
    "plain.txt.bz2": (b"not compressed", r"data: .*plain\.txt\.bz2 can't be read"),
}


@pytest.mark.parametrize("name", NOT_TEXT)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    content, message = NOT_TEXT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    data = COMPRESSORS[suffix](random_text(1000).encode())
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: int(torch.randint(len(data) // 4, len(data) - 8, ()))])
    with pytest.raises(InputError, match=r"data: .*a\.txt.* can't be read"):
        list(read_documents(path))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str) -> None:
    data = bytearray(COMPRESSORS[suffix](random_text(1000).encode()))
    for place in torch.randint(len(data) // 4, len(data) // 2, (20,)).tolist():
        data[place] ^= 0xFF
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"data: .*a\.txt.* (can't be read|must be)"):
        list(read_documents(path))


@pytest.mark.parametrize(
    "bad", ["no json", '{"text": "cut off', '{"body": "w3"}', '"w3"', "[1]", "7", '{"text": null}', '{"text": ["w3"]}']
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, bad: str) -> None:
    before = int(torch.randint(0, 5, ()))
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(["w3"] * before) + bad.encode() + b"\n" + lines_of(["w4"]))
    with pytest.raises(InputError, match=rf"data: line {before + 1} of .*a\.jsonl must be a JSON object whose 'text'"):
        list(read_documents(path))
