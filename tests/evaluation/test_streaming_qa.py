"""StreamingQA's questions joined with the articles of the WMT News Crawls."""

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gakernels.cli import main
from gakernels.errors import InputError
from gakernels.evaluation.datasets import read_documents
from gakernels.evaluation.streaming_qa import join_streaming_qa

# Names of articles as StreamingQA's own script computes them, from its test: of `unsplit_1` and `unsplit_3`.
FIRST = "20190101000000000000\0\x011d377af8d421d226f274f12d31d4cc15e7c6f85e2e1eb2530e19b123d019d776\0\x01"
THIRD = "20200103000000000000\0\x01f86e132442e069c17be5b53fa9f2890b54007a4f12332e717e29f35d3b96accc\0\x01"


def article(date: str, split: str, unsplit: str) -> bytes:
    return b"\t".join([date.encode(), base64.b64encode(split.encode()), base64.b64encode(unsplit.encode())])


@pytest.fixture
def crawls(tmp_path: Path) -> list[Path]:
    lines = {
        2019: [article("20190101", "Split 1.\nÉté.", "unsplit_1"), article("20190102", "split 2", "unsplit_2")],
        2020: [b"20200103\tnot Base64", article("20200103", "split 3", "unsplit_3"), article("20200103", "x", "other")],
    }
    files = []
    for year, articles in lines.items():
        files.append(tmp_path / f"news-docs.{year}.en.filtered.gz")
        files[-1].write_bytes(gzip.compress(b"\n".join(articles)))
    return files


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    entries = [
        {"qa_id": "eval-0", "question": "Third?", "answers": ["a", "b", "a"], "evidence_id": THIRD},
        {"qa_id": "eval-1", "question": "First?", "answers": ["c"], "evidence_id": FIRST, "recent_or_past": "past"},
        {"qa_id": "eval-2", "question": "Nowhere?", "answers": ["d"], "evidence_id": THIRD.replace("f86e", "0000")},
        {"qa_id": "eval-3", "question": "First again?", "answers": ["e"], "evidence_id": FIRST},
        {"qa_id": "eval-4", "question": "No answer?", "answers": [], "evidence_id": FIRST},
    ]
    path = tmp_path / "streaminqa_eval.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, entries)).encode()))
    return path


def test_articles_are_found_by_the_names_that_streaming_qa_gives_them(questions: Path, crawls: list[Path]) -> None:
    rows, skipped = join_streaming_qa(questions, crawls)
    assert rows == [
        {"id": "eval-0", "context": "split 3", "question": "Third?", "answers": ["a", "b"]},
        {"id": "eval-1", "context": "Split 1.\nÉté.", "question": "First?", "answers": ["c"]},
        {"id": "eval-3", "context": "Split 1.\nÉté.", "question": "First again?", "answers": ["e"]},
    ]
    assert skipped.counts == {
        "article that is not a date and two texts in Base64": 1,
        "question whose article is in none of the files": 1,
        "question without answers": 1,
    }


def test_the_command_writes_what_docqa_reads(
    questions: Path, crawls: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "eval.jsonl"
    arguments = ["data", "streamingqa", "--questions", str(questions), "--output", str(output)]
    assert main([*arguments, "--articles", *map(str, crawls)]) == 0
    told = capsys.readouterr().out
    assert f"3 questions about 2 articles: {output}" in told
    assert "left out: 1 x question whose article is in none of the files (first: line 3 of" in told
    read = read_documents(str(output)).contexts
    assert [(context.text, len(context.questions)) for context in read] == [("split 3", 1), ("Split 1.\nÉté.", 2)]
    assert read[0].questions[0].answers == ("a", "b")


def test_files_that_do_not_fit(questions: Path, crawls: list[Path], refused: Callable[..., Any]) -> None:
    assert "has no question whose article is in the files: " in refused(questions, crawls[:0])
    assert f"there is no file {questions}x" in refused(Path(f"{questions}x"), crawls)


@pytest.fixture
def refused() -> Callable[..., str]:
    def message(*arguments: Any) -> str:
        with pytest.raises(InputError) as error:
            join_streaming_qa(*arguments)
        return str(error.value)

    return message
