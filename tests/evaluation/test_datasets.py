"""Readers of data sets: tiny files of each format, good and bad."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gakernels.errors import InputError
from gakernels.evaluation.datasets import (
    PERSONA_CHAT_COLUMNS,
    EvaluationContext,
    Question,
    flat_answers,
    read_documents,
    read_flat_qa,
    read_locomo,
    read_msc,
    read_persona_chat,
    read_squad,
    read_streaming_qa,
    read_task,
    task_file,
)
from gakernels.evaluation.icl import TEST_TASKS
from gakernels.evaluation.scenarios import group_contexts


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a value as JSON, a list of values as JSON lines, a text as it is."""

    def write(content: Any) -> Path:
        if isinstance(content, list):
            content = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in content)
        text = content if isinstance(content, str) else json.dumps(content)
        path = tmp_path / "data.json"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# SQuAD


def paragraph(text: Any, *qas: Any) -> dict[str, Any]:
    return {"context": text, "qas": list(qas)}


def qa(question: Any, *answers: Any, id: str = "q") -> dict[str, Any]:
    return {"id": id, "question": question, "answers": [{"text": text, "answer_start": 0} for text in answers]}


def squad(*paragraphs: Any) -> dict[str, Any]:
    return {"version": "1.1", "data": [{"title": "Warsaw", "paragraphs": list(paragraphs)}]}


def test_squad(write: Callable[[Any], Path]) -> None:
    path = write(
        "\ufeff" + json.dumps(squad(paragraph(" Warsaw is old.\n", qa(" How old? ", "old", " very old", id="7"))))
    )
    data = read_squad(path)
    assert data.contexts == (
        EvaluationContext("Warsaw is old.", (Question("How old?", ("old", "very old"), id="7"),), "Warsaw"),
    )
    assert data.skipped.total == 0


def test_bad_records_of_squad_are_counted_and_the_rest_goes_on(write: Callable[[Any], Path]) -> None:
    good = paragraph("Warsaw is old.", qa("How old?", "old"))
    content = squad(
        good,
        paragraph("  ", qa("How old?", "old")),
        paragraph(None),
        "nothing",
        paragraph("Text.", qa("Impossible?"), qa("", "x"), qa("Blank?", " "), 3),
        paragraph("Text.", {"question": "x", "answers": [4, {"text": 5}]}),
        good,
    )
    content["data"] += [{"title": "Empty"}, 5]
    path = write(content)
    data = read_squad(path)
    assert len(data.contexts) == 2
    assert data.skipped.counts == {
        "paragraph without text": 3,
        "question without answers": 3,
        "question without text": 2,
        "paragraph without questions": 2,
        "article without paragraphs": 2,
    }
    assert data.skipped.places["question without text"][0] == f"{path}: data[0].paragraphs[4].qas[1]"
    assert data.skipped.total == 12
    assert f"2 x article without paragraphs (first: {path}: data[1], {path}: data[2])" in str(data.skipped)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [', r"data\.json must be JSON, but it is not: .* line 1 column"),
        ("[" * 10_000, "must be JSON, but it is not"),
        ([], "must be JSON, but it is not"),
        ("[1]", 'must be a SQuAD file, a JSON object with a list "data"'),
        ({"data": {}}, 'must be a SQuAD file, a JSON object with a list "data"'),
        ({"data": []}, "has no context with a question and an answer$"),
        (squad(paragraph("x", qa("y"))), "and an answer: 1 x question without answers .first: .*1 x paragraph without"),
    ],
)
def test_a_file_that_is_no_squad_is_refused(write: Callable[[Any], Path], content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_squad(write(content))


@pytest.mark.parametrize("read", [read_squad, read_task, read_msc, read_persona_chat])
def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(InputError, match=r"there is no file .*none"):
        read(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="binary must be UTF-8 text"):
        read(tmp_path / "binary")


# MetaICL


def item(given: Any = "x", wanted: Any = "yes", options: Any = ("yes", "no"), task: Any = "t") -> dict[str, Any]:
    return {"task": task, "input": given, "output": wanted, "options": list(options)}


def test_a_task(write: Callable[[Any], Path]) -> None:
    path = write(
        [item("one"), "", item("two", "no", ["no", "yes"]), "{", "[]", item(""), item("x", 3), item("x", "maybe")]
    )
    task = read_task(path)
    assert task.name == "t"
    assert [(q.text, q.answers, q.options) for q in task.items] == [
        ("one", ("yes",), ("yes", "no")),
        ("two", ("no",), ("no", "yes")),
    ]
    assert task.is_classification
    assert task.skipped.counts == {
        "line that is not a JSON object": 2,
        "item without input": 1,
        "item without output": 1,
        "item whose output is not among its options": 1,
    }
    assert task.skipped.places["line that is not a JSON object"][0] == f"{path}:4"


def test_tasks_with_different_options_or_none_are_no_classification(write: Callable[[Any], Path]) -> None:
    assert not read_task(write([item("x", "a", ["a", "b"]), item("x", "c", ["c", "d"])])).is_classification
    assert not read_task(write([item(options=[]), item(options=[])])).is_classification
    assert read_task(write([{"input": "x", "output": "y"}])).name == "data"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no item with input and output$"),
        ([item("")], "has no item with input and output: 1 x item without input"),
        ([item(), item(task="other")], "must hold one task, but it holds other, t"),
    ],
)
def test_a_file_that_is_no_task_is_refused(write: Callable[[Any], Path], lines: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_task(write("".join(json.dumps(line) + "\n" for line in lines)))


def test_files_of_tasks() -> None:
    assert len(set(TEST_TASKS)) == 26
    assert task_file(Path("data"), "glue-rte", "test", 100) == Path("data/glue-rte/glue-rte_16_100_test.jsonl")
    with pytest.raises(InputError, match="split must be one of train, dev, test, but it is 'all'"):
        task_file(Path("data"), "glue-rte", "all", 100)


# Conversations


def session(*texts: str, **more: Any) -> dict[str, Any]:
    return {"dialog": [{"text": text} for text in texts], **more}


LAST = [
    {"text": "New job?", "id": "Speaker 1"},
    {"text": "Yes.", "id": "Speaker 2"},
    {"text": "Ah.", "id": "Speaker 1"},
]
LINE = {
    "previous_dialogs": [session("Hi.", " Hello. ", ""), session("Cats?", "Dogs.")],
    "dialog": LAST,
    "personas": [["I have a cat.", "I work."], ["I have a dog."]],
    "self_instruct": {"B": "What pet do I have?", "A": "a dog"},
}
SESSIONS = "Speaker 1: Hi.\nSpeaker 2: Hello.\n\nSpeaker 1: Cats?\nSpeaker 2: Dogs."


def test_self_instruct_asks_about_all_sessions(write: Callable[[Any], Path]) -> None:
    (context,) = read_msc(write([LINE])).contexts
    assert context.text == f"{SESSIONS}\n\nSpeaker 1: New job?\nSpeaker 2: Yes.\nSpeaker 1: Ah."
    assert context.questions == (Question("What pet do I have?", ("a dog",), id="data.json:1"),)


def test_responses_are_asked_after_the_earlier_sessions(write: Callable[[Any], Path]) -> None:
    (context,) = read_msc(write([LINE]), "response").contexts
    assert context.text == SESSIONS
    assert [(question.text, question.answers) for question in context.questions] == [
        ("Speaker 1: New job?\nSpeaker 2:", ("Yes.",)),
        ("Speaker 1: New job?\nSpeaker 2: Yes.\nSpeaker 1:", ("Ah.",)),
    ]


def test_personas_are_recalled(write: Callable[[Any], Path]) -> None:
    (context,) = read_msc(write([{**LINE, "personas": [["I have a cat.", "I work."], []]}]), "recall").contexts
    assert context.text == SESSIONS
    assert [(question.text, question.answers) for question in context.questions] == [
        ("What is known about Speaker 1?", ("I have a cat. I work.",))
    ]


def test_bad_lines_of_conversations_are_counted(write: Callable[[Any], Path]) -> None:
    lines = [LINE, "{", {**LINE, "previous_dialogs": [3, {}]}, {**LINE, "self_instruct": {"B": "x"}}, {}]
    path = write(lines)
    data = read_msc(path)
    assert len(data.contexts) == 1
    assert data.skipped.counts == {
        "line that is not a JSON object": 1,
        "line without earlier sessions": 2,
        "line without what self_instruct questions need": 1,
    }
    assert data.skipped.places["line without earlier sessions"][0] == f"{path}:3"
    with pytest.raises(InputError, match="questions must be one of self_instruct, response, recall, but it is 'all'"):
        read_msc(path, "all")


def rows(path: Path, *rows: tuple[str, ...], header: tuple[str, ...] = PERSONA_CHAT_COLUMNS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


CHAT = "User 1: Hi!\nUser 2: Hello: you?\nand more\n\nUser 1: Bye."


def test_personas_of_a_chat_are_recalled(tmp_path: Path) -> None:
    path = rows(tmp_path / "chat.csv", ("I bake.\nI knit.", "", CHAT), ("I run.", "I swim.", CHAT))
    one, two = read_persona_chat(path).contexts
    assert one.text == "User 1: Hi!\nUser 2: Hello: you? and more\nUser 1: Bye."
    assert [(question.text, question.answers) for question in one.questions] == [
        ("What is known about User 1?", ("I bake. I knit.",))
    ]
    assert [question.answers for question in two.questions] == [("I run.",), ("I swim.",)]


def test_responses_are_asked_after_the_personas(tmp_path: Path) -> None:
    path = rows(tmp_path / "chat.csv", ("I bake.\nI knit.", "I swim.", CHAT))
    (context,) = read_persona_chat(path, "response").contexts
    assert context.text == "User 1: I bake. I knit.\n\nUser 2: I swim."
    assert [question.answers for question in context.questions] == [("Hello: you? and more",), ("Bye.",)]
    assert context.questions[0].text == "User 1: Hi!\nUser 2:"


def test_bad_rows_of_a_chat_are_counted(tmp_path: Path) -> None:
    good = ("I bake.", "I swim.", CHAT)
    path = rows(tmp_path / "chat.csv", good, ("I bake.", "I swim.", "words"), ("", " ", CHAT), ("I bake.",), good)
    data = read_persona_chat(path)
    assert len(data.contexts) == 2
    assert data.skipped.counts == {"row without a conversation": 2, "row without personas": 1}
    assert data.skipped.places["row without a conversation"][0].startswith(f"{path}:")


def test_a_file_that_is_no_chat_is_refused(tmp_path: Path) -> None:
    path = rows(tmp_path / "chat.csv", ("x", "y"), header=("user 1 personas", "text"))
    with pytest.raises(InputError, match=r"must have the columns .*, but 'user 2 personas' is missing"):
        read_persona_chat(path)
    path.write_text(",".join(PERSONA_CHAT_COLUMNS) + '\n"open', encoding="utf-8")
    with pytest.raises(InputError, match=r"chat.csv:\d is not CSV: unexpected end of data"):
        read_persona_chat(path)
    with pytest.raises(InputError, match="has no context with a question and an answer"):
        read_persona_chat(rows(path))
    with pytest.raises(InputError, match="questions must be one of recall, response"):
        read_persona_chat(path, "all")


# StreamingQA


@pytest.fixture
def articles(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: list[str], header: tuple[str, ...] = ("id", "question", "answers", "text")) -> Path:
        path = tmp_path / "articles.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return path

    return write


def test_streaming_qa(articles: Callable[..., Path]) -> None:
    path = articles(
        ["a", "Who won?", "Ann\\ Ann Lee \\", 'Ann, who is "fast",\nwon.'],
        ["b", "Where?", "Rome", 'Ann, who is "fast",\nwon.'],
    )
    data = read_streaming_qa(path)
    text = 'Ann, who is "fast",\nwon.'
    first, second = (
        Question("Who won?", ("Ann", "Ann Lee"), id="articles.csv:3"),
        Question("Where?", ("Rome",), id="articles.csv:5"),
    )
    assert [(context.text, context.questions) for context in data.contexts] == [(text, (first,)), (text, (second,))]
    assert data.skipped.total == 0
    (joined,) = group_contexts(data.contexts, 1000)
    assert (joined.text, joined.questions) == (text, (first, second))


def test_bad_rows_of_streaming_qa_are_counted(articles: Callable[..., Path]) -> None:
    good = ["a", "Who?", "Ann", "Ann won."]
    data = read_streaming_qa(
        articles(good, ["b", "", "Ann", "x"], ["c", "Who?", " \\ ", "x"], ["d", "Who?", "Ann"], good)
    )
    assert len(data.contexts) == 2
    assert data.skipped.counts == {"row without question": 1, "row without answers": 1, "row without text": 1}


def test_streaming_qa_without_a_column_or_a_row_is_refused(articles: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"must have the columns text, question, answers, but 'answers' is missing"):
        read_streaming_qa(articles(["a", "b"], header=("text", "question")))
    with pytest.raises(InputError, match=r"has no context with a question and an answer: 1 x row without text"):
        read_streaming_qa(articles(["a", "Who?", "Ann", " "]))


# Flat rows

FLAT_ROWS: list[dict[str, Any]] = [
    {"context": " Warsaw is old. ", "question": "How old?", "answer": "old", "id": "a", "category": 2},
    {"context": "Gdańsk is by the sea.", "question": "Where?", "answer": "by the sea", "id": "b", "category": 2},
    {"context": "Warsaw is old.", "question": "What is old?", "answer": "Warsaw", "id": "c", "category": 2},
]


def flat_file(folder: Path, kind: str) -> Path:
    path = folder / f"rows{kind}"
    if kind == ".json":
        path.write_text(json.dumps(FLAT_ROWS), encoding="utf-8")
    elif kind == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(FLAT_ROWS[0]))
            writer.writeheader()
            writer.writerows(FLAT_ROWS)
    elif kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(FLAT_ROWS), path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in FLAT_ROWS).encode()
        path.write_bytes(gzip.compress(lines) if kind.endswith(".gz") else lines)
    return path


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".jsonl.gz", ".csv", ".parquet"])
def test_rows_about_the_same_context_are_one(tmp_path: Path, kind: str) -> None:
    data = read_documents(str(flat_file(tmp_path, kind)))
    assert [context.text for context in data.contexts] == ["Warsaw is old.", "Gdańsk is by the sea."]
    assert data.contexts[0].questions == (
        Question("How old?", ("old",), id="a", category="2"),
        Question("What is old?", ("Warsaw",), id="c", category="2"),
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


def test_a_row_may_have_several_questions(tmp_path: Path) -> None:
    path, asked = tmp_path / "rows.jsonl", [{**row, "context": None} for row in FLAT_ROWS[::2]]
    rows = [{"context": "Warsaw is old.", "qas": [*asked, {"question": "Who?"}]}, {"context": "c", "qas": []}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, FLAT_ROWS[1]]))
    data = read_flat_qa(str(path))
    assert data.contexts == read_documents(str(flat_file(tmp_path, ".json"))).contexts
    assert data.skipped.counts == {"row without answer": 1, "row without questions": 1}
    assert data.skipped.places["row without answer"] == [f"question 3 of line 1 of {path}"]


def test_what_can_not_be_used_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    bad = [{"question": "?", "answer": "a"}, {"context": "c", "answer": "a"}, {"context": "c", "question": "?"}, [1]]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*bad, FLAT_ROWS[0]]) + "{\n")
    skipped = read_flat_qa(str(path)).skipped
    assert skipped.counts == {
        "row without context": 1,
        "row without question": 1,
        "row without answer": 1,
        "line that is not a JSON object": 1,
        "line that is not JSON": 1,
    }
    assert "line 2 of" in skipped.places["row without question"][0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "3", "must be a list of rows"),
        ("a.json", "[", "must be JSON, but it is not"),
        ("a.json", "[3]", "has no context with a question and an answer: 1 x row that is not a JSON object"),
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


# LoCoMo


def locomo_entry(**changes: Any) -> dict[str, Any]:
    return {
        "sample_id": "conv-1",
        "conversation": {
            "speaker_a": "Ann",
            "speaker_b": "Bob",
            "session_10_date_time": "2 May",
            "session_10": [{"speaker": "Ann", "text": "Later.", "dia_id": "D10:1"}],
            "session_2_date_time": "1 May",
            "session_2": [
                {"speaker": "Bob", "text": " Hi! ", "blip_caption": "a photo of a dog", "img_url": ["x"]},
                {"speaker": "Ann", "text": ""},
                {"speaker": "Ann", "text": "", "blip_caption": "a cat"},
                3,
            ],
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


def locomo_file(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_sessions_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = locomo_file(tmp_path / "l.json", [locomo_entry(), locomo_entry(conversation={}), locomo_entry(qa=[]), None])
    data = read_locomo(path)
    (context,) = data.contexts
    assert context.text == "1 May\nBob: Hi! [image: a photo of a dog]\nAnn: [image: a cat]\n\n2 May\nAnn: Later."
    assert [(question.text, question.answers, question.category) for question in context.questions] == [
        ("When?", ("2022",), "temporal"),
        ("Who?", ("Bob",), ""),
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
def test_a_file_that_is_no_locomo_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "l.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_locomo(path)
