"""Flat rows of questions: every kind of file gives the same contexts."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gakernels.errors import InputError
from gakernels.evaluation.datasets import Question, flat_answers, read_documents, read_flat_qa
from gakernels.evaluation.scenarios import docqa

ROWS: list[dict[str, Any]] = [
    {"context": " Warsaw is old. ", "question": "How old?", "answer": "old", "id": "a"},
    {"context": "Gdańsk is by the sea.", "question": "Where?", "answer": "by the sea", "id": "b"},
    {"context": "Warsaw is old.", "question": "What is old?", "answer": "Warsaw", "id": "c"},
]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows{kind}"
    if kind == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        path.write_bytes(gzip.compress(lines) if kind.endswith(".gz") else lines)
    return path


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".jsonl.gz", ".csv", ".parquet"])
def test_rows_about_the_same_context_are_one(tmp_path: Path, kind: str) -> None:
    data = read_documents(str(write(tmp_path, kind)))
    assert [context.text for context in data.contexts] == ["Warsaw is old.", "Gdańsk is by the sea."]
    assert data.contexts[0].questions == (
        Question("How old?", ("old",), id="a"),
        Question("What is old?", ("Warsaw",), id="c"),
    )
    assert data.skipped.total == 0


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answer": 1912}, ("1912",)),
        ({"answer": 0.5}, ("0.5",)),
        ({"answers": ["a", " a ", "", "b"]}, ("a", "b")),
        ({"answers": {"text": ["a", "b"], "answer_start": [0, 1]}}, ("a", "b")),
        ({"answers": None, "answer": "a"}, ("a",)),
        ({"answer": "  "}, ()),
        ({}, ()),
    ],
)
def test_answers_in_every_form(row: dict[str, Any], answers: tuple[str, ...]) -> None:
    assert flat_answers(row) == answers


def test_what_can_not_be_used_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    bad = [{"question": "?", "answer": "a"}, {"context": "c", "answer": "a"}, {"context": "c", "question": "?"}, [1]]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*bad, ROWS[0]]) + "{\n")
    skipped = read_flat_qa(str(path)).skipped
    assert skipped.counts == {
        "row without context": 1,
        "row without question": 1,
        "row without answer": 1,
        "line that is no JSON object": 1,
        "line that is no JSON": 1,
    }
    assert "line 2 of" in skipped.places["row without question"][0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "3", "must be a list of rows"),
        ("a.json", "[", "must be JSON, but it is not"),
        ("a.json", "[3]", "has no context with a question and an answer: 1 x row that is no JSON object"),
        ("a.csv", "context,answer\n", "must have the columns context, question, but 'question' is missing"),
        ("a.jsonl", "", "has no context with a question and an answer"),
    ],
)
def test_files_of_another_form(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_flat_qa(str(tmp_path / name))
    with pytest.raises(InputError, match="there is no file"):
        read_flat_qa(str(tmp_path / "none.jsonl"))


def test_each_document_by_itself(tmp_path: Path) -> None:
    data = read_documents(str(write(tmp_path, ".json")))
    scenario = docqa(data, len, None)
    assert [case.context.text for case in scenario.cases] == [context.text for context in data.contexts]
    assert {case.cell for case in scenario.cases} == {(("length", "own"),)}
    assert [case.other for case in scenario.cases] == [1, 0]
