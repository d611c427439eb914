"""Records of JSON lines and Parquet: what is read, and how what can't be read is counted."""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from invented import random_text
from writing import COMPRESSORS, drawn, json_lines, write

from gakernels import InputError
from gakernels.data import BadRecords
from gakernels.data.records import Record, read_records


def read(path: Path, columns: list[str] | None = None) -> tuple[list[Record], BadRecords]:
    bad = BadRecords()
    return list(read_records(path, bad, columns)), bad


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ""])
def test_each_line_is_a_record(tmp_path: Path, kind: str, suffix: str) -> None:
    texts = [random_text(drawn(1, 30)) + "ä\u2028\u4e16" for _ in range(5)]  # U+2028 ends no line of a file
    path = write(tmp_path / f"notes{kind}{suffix}", json_lines(texts[:2]) + b"\r\n  \n" + json_lines(texts[2:]))
    records, bad = read(path)
    assert [record.entries["text"] for record in records] == texts
    assert [record.entries["id"] for record in records] == [0, 1, 0, 1, 2]
    assert [record.place for record in records] == [f"line {number} of {path}" for number in (1, 2, 5, 6, 7)]
    assert bad.total == 0


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    records, bad = read(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json_lines(["w3"])))
    assert ([record.entries for record in records], bad.total) == ([{"id": 0, "text": "w3"}], 0)


BAD_LINES = {
    b"no json": "line that is not JSON",
    b'{"text": "cut off': "line that is not JSON",
    b"[" * 100_000: "line that is not JSON",
    b'{"n": ' + b"1" * 5000 + b"}": "line that is not JSON",
    b'"w3"': "line that is not a JSON object",
    b"[1]": "line that is not a JSON object",
    b"7": "line that is not a JSON object",
    b"null": "line that is not a JSON object",
    '{"text": "größe"}'.encode("latin-1"): "line that is not UTF-8",
}


@pytest.mark.parametrize(("line", "kind"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_is_counted_and_the_rest_goes_on(tmp_path: Path, line: bytes, kind: str) -> None:
    before, after = drawn(0, 5), drawn(1, 5)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["w3"] * before) + line + b"\n" + json_lines(["w4"] * after) + line)
    records, bad = read(path)
    assert [record.entries["text"] for record in records] == ["w3"] * before + ["w4"] * after
    assert bad.counts == {kind: 2}
    assert bad.places == {kind: [f"line {number} of {path}" for number in (before + 1, before + after + 2)]}
    with pytest.raises(InputError, match=f"data: line {before + 1} of .*a.jsonl: {kind}"):
        list(read_records(path, BadRecords(strict=True)))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_a_truncated_file_gives_what_is_there_and_is_counted(tmp_path: Path, suffix: str) -> None:
    texts = [random_text(200) for _ in range(300)]
    data = COMPRESSORS[suffix](json_lines(texts))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(data[: drawn(len(data) // 4, len(data) - 8)])
    records, bad = read(path)
    assert [record.entries["text"] for record in records] == texts[: len(records)]
    assert len(records) < 300 or suffix == ".gz"  # all of the text may be there, and only the checksum be missing
    assert list(bad.counts) == ["file that can't be read to its end"]
    assert str(path) in bad.places["file that can't be read to its end"][0]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst", ".parquet"])
def test_a_file_of_another_format_than_its_name_says_is_counted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(json_lines(["w3"]))
    records, bad = read(path)
    assert (records, bad.counts) == ([], {"file that can't be read to its end": 1})


def parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def test_each_row_of_a_parquet_file_is_a_record(tmp_path: Path) -> None:
    texts = [random_text(drawn(1, 30)) + "äöü" for _ in range(20)]
    path = parquet(tmp_path / "a.parquet", text=texts, turns=[[{"role": "user"}]] * 20)
    records, bad = read(path)
    assert [record.entries for record in records] == [{"text": text, "turns": [{"role": "user"}]} for text in texts]
    assert [record.place for record in records] == [f"row {number} of {path}" for number in range(1, 21)]
    assert [record.entries for record in read(path, ["text"])[0]] == [{"text": text} for text in texts]
    assert bad.total == 0


def test_a_parquet_file_without_the_column_is_counted_with_the_columns_it_has(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", body=["w3"], id=[1])
    records, bad = read(path, ["text"])
    assert (records, bad.counts) == ([], {"Parquet file without the column text": 1})
    assert bad.places == {"Parquet file without the column text": [f"{path} (it has body, id)"]}


def test_a_row_that_is_no_text_in_parquet_is_counted(tmp_path: Path) -> None:
    good, place = [random_text(3) for _ in range(9)], drawn(0, 10)
    values = [text.encode() for text in good]
    values.insert(place, "größe".encode("latin-1"))
    table = pyarrow.table({"text": pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    records, bad = read(tmp_path / "a.parquet")
    assert [record.entries["text"] for record in records] == good
    assert bad.places == {"row that is not UTF-8": [f"row {place + 1} of {tmp_path / 'a.parquet'}"]}


def test_a_damaged_parquet_file_is_counted(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=[random_text(30) for _ in range(200)])
    data = bytearray(path.read_bytes())
    for place in torch.randint(len(data) // 4, len(data) // 2, (200,)).tolist():
        data[place] ^= 0xFF
    path.write_bytes(data)
    assert list(read(path)[1].counts) == ["file that can't be read to its end"]


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "backports")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    if module == "backports" and sys.version_info >= (3, 14):
        pytest.skip("Python's own library reads it")
    path = write(tmp_path / name, json.dumps({"text": "w3"}).encode())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        InputError, match=rf"reading .*{name} needs the package {module}.*pip install 'gakernels\[data\]'"
    ):
        read(path)
