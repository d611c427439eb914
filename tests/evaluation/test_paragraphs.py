"""HotpotQA, MuSiQue and MS MARCO as they are published, read as documents with questions."""

import gzip
import json
from pathlib import Path
from typing import Any

from gakernels.evaluation.datasets import EvaluationContext, Question, read_documents


def contexts(path: Path, rows: list[Any], as_list: bool = False) -> tuple[EvaluationContext, ...]:
    text = json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return read_documents(str(path)).contexts


def test_hotpot_qa(tmp_path: Path) -> None:
    row = {
        "_id": "5a8b",
        "question": "Where?",
        "answer": "yes",
        "type": "comparison",
        "supporting_facts": [["Scott", 0]],
        "context": [["Scott", ["Scott is one. ", " He is two."]], ["Empty", []], ["Ed", ["Ed is three."]]],
    }
    text = "Scott\nScott is one.  He is two.\n\nEd\nEd is three."
    expected = (EvaluationContext(text, (Question("Where?", ("yes",), id="5a8b"),), "5a8b"),)
    assert contexts(tmp_path / "hotpot_dev_distractor_v1.json", [row], as_list=True) == expected
    titles, sentences = zip(*row["context"], strict=True)
    hub = {**row, "id": row["_id"], "context": {"title": titles, "sentences": sentences}}
    del hub["_id"]
    assert contexts(tmp_path / "hub.jsonl", [hub]) == expected


def test_musique(tmp_path: Path) -> None:
    row = {
        "id": "2hop__1",
        "paragraphs": [
            {"idx": 0, "title": "A", "paragraph_text": "First text.", "is_supporting": False},
            {"idx": 1, "title": "B", "paragraph_text": "Second text.", "is_supporting": True},
        ],
        "question": "Who?",
        "answer": "Ann",
        "answer_aliases": ["Anna", "Ann"],
        "answerable": True,
    }
    unanswerable = {**row, "id": "2hop__2", "answerable": False}
    path = tmp_path / "musique_ans_v1.0_dev.jsonl"
    asked = Question("Who?", ("Ann", "Anna"), id="2hop__1")
    assert contexts(path, [row, unanswerable]) == (
        EvaluationContext("A\nFirst text.\n\nB\nSecond text.", (asked,), "2hop__1"),
    )
    assert read_documents(str(path)).skipped.counts == {"row without answer": 1}


def test_ms_marco(tmp_path: Path) -> None:
    passages = [{"is_selected": number, "passage_text": f"Passage {number}.", "url": "u"} for number in range(2)]
    row = {"query_id": 9, "query": "what is it", "query_type": "entity", "answers": ["A thing."], "passages": passages}
    without = {**row, "query_id": 10, "answers": ["No Answer Present."]}
    asked = (Question("what is it", ("A thing.",), id="9"),)
    expected = (EvaluationContext("Passage 0.\n\nPassage 1.", asked, "9"),)
    assert contexts(tmp_path / "dev_v1.1.jsonl.gz", [row, without]) == expected
    columns = {key: [passage[key] for passage in passages] for key in passages[0]}
    assert contexts(tmp_path / "hub.jsonl", [{**row, "passages": columns}]) == expected
