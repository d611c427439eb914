"""LoCoMo's files."""

import json
from pathlib import Path
from typing import Any

import pytest

from gakernels import InputError
from gakernels.evaluation.datasets import read_locomo


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "sample_id": "conv-1",
        "conversation": {
            "speaker_a": "Ann",
            "speaker_b": "Bob",
            "session_10_date_time": "2 May",
            "session_10": [{"speaker": "Ann", "text": "Later.", "dia_id": "D10:1"}],
            "session_2_date_time": "1 May",
            "session_2": [{"speaker": "Bob", "text": " Hi! "}, {"speaker": "Ann", "text": ""}, 3],
            "session_3": [],
            "session_2_summary": "x",
        },
        "qa": [
            {"question": "When?", "answer": 2022, "category": 2},
            {"question": "Who?", "answer": "Bob"},
            {"question": "What not?", "adversarial_answer": "x", "category": 5},
            {"answer": "y"},
            "no question",
        ],
        **changes,
    }


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_sessions_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "l.json", [entry(), entry(conversation={}), entry(qa=[]), None])
    data = read_locomo(path)
    (context,) = data.contexts
    assert context.text == "1 May\nBob: Hi!\n\n2 May\nAnn: Later."
    assert [(question.text, question.answers) for question in context.questions] == [
        ("When?", ("2022",)),
        ("Who?", ("Bob",)),
    ]
    assert context.name == "conv-1"
    assert data.skipped.counts == {
        "question without answers": 2,
        "question without text": 4,
        "entry without sessions": 2,
        "entry without questions": 1,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "must be JSON"), ("{}", "must be a LoCoMo file"), ("[]", "has no context with a question")],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "l.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_locomo(path)
