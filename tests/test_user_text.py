"""Text files as people have them: every encoding that tells itself is read, anything else is named with its place."""

import codecs
import gzip
import json
from pathlib import Path

import pytest

from gakernels import InputError
from gakernels.cli.common import read_text
from gakernels.data.bad_records import BadRecords
from gakernels.data.documents import file_documents
from gakernels.data.instruction_sources import InstructionSource, read_source
from gakernels.evaluation.datasets import read_squad
from gakernels.evaluation.perplexity import document_texts
from gakernels.server.settings import ApiKeys
from gakernels.training.pretraining_recipe import PretrainingRecipe
from gakernels.training.recipes import load_recipe
from gakernels.user_text import read_user_text

TEXT = "Größe, 名前, 😀\nline two\n"
ENCODINGS = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16-le": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "line ends of windows": codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_text_is_read_in_every_encoding_that_tells_itself(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(ENCODINGS[name])
    assert read_user_text(path) == read_text(path) == TEXT
    assert ["".join(pieces) for pieces in file_documents(path, "text", BadRecords(strict=True))] == [TEXT]


LONG = "ab" * 70_000  # more than is decoded at once


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ("Größe".encode("latin-1"), 2),
        (codecs.BOM_UTF8 + b"ab\x80", 5),
        (LONG.encode() + b"\xff", 140_000),
        ("ab€".encode()[:-1], 2),
        (LONG.encode()[:65_535] + "€".encode()[:2] + b"x", 65_535),
        (codecs.BOM_UTF16_LE + "ab".encode("utf-16-le") + b"\x00\xdc", 6),
        (codecs.BOM_UTF16_BE + "ab".encode("utf-16-be") + b"c", 6),
        (b"abc\0", 3),
        ("a\0".encode("utf-16"), 4),
        ("key".encode("utf-16-le"), 1),  # without a mark
        ("key".encode("utf-32"), 2),
        (LONG.encode() + "ä\0".encode(), 140_002),
    ],
)
def test_anything_else_is_named_with_the_place_of_the_first_wrong_byte(tmp_path: Path, data: bytes, place: int) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"notes\.txt must be .*text.*byte {place} is (wrong|one)$") as error:
        read_user_text(path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"--chat-template: .*notes\.txt must be"):
        read_text(path, "--chat-template")


KEYS = ["first-key-of-16-characters", "second-key-of-16-characters"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_api_keys(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "keys"
    path.write_text("\n".join(KEYS), encoding=encoding)
    keys = ApiKeys.read(path)
    assert all(keys.owner(key) == ApiKeys(KEYS).owner(key) for key in KEYS)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "utf-32"])
def test_api_keys_that_are_no_text_show_no_key(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "keys"
    path.write_text("\n".join(KEYS) + "é" * 16, encoding=encoding)
    with pytest.raises(InputError, match=r"keys must be .*: byte \d+ is") as error:
        ApiKeys.read(path)
    assert "first" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_data_recipes_and_questions(tmp_path: Path, encoding: str) -> None:
    rows = [{"context": f"c{n} ä", "question": "q", "answer": "名", "text": f"t{n}"} for n in range(3)]
    files = {
        "rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "rows.json": json.dumps(rows, ensure_ascii=False),
        "recipe.yaml": "model: {name: größe}\ndata: {path: a}\ntrainer: {steps: 200}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding=encoding)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.json"):
        records = read_source(InstructionSource(str(tmp_path / name)), BadRecords(strict=True))
        assert [record.context for record in records] == ["c0 ä", "c1 ä", "c2 ä"]
        assert {record.conversations[0][1].content for record in records} == {"名"}
    assert load_recipe(PretrainingRecipe, tmp_path / "recipe.yaml").model.name == "größe"
    assert [text for _, text in document_texts(tmp_path / "rows.jsonl", BadRecords())] == ["t0", "t1", "t2"]
    squad = {"data": [{"paragraphs": [{"context": "ä", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad, ensure_ascii=False), encoding=encoding)
    assert read_squad(tmp_path / "squad.json").contexts[0].text == "ä"


def test_json_lines_that_are_no_utf_16_are_no_file_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"context": "c"}\n'.encode("utf-16")[:-1])
    bad = BadRecords()
    with pytest.raises(InputError, match=r"can't be read to its end \(first: .*a\.jsonl \(it is not UTF-16"):
        read_source(InstructionSource(str(path)), bad)
