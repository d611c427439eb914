"""Rows of every form in files of every kind, and what can't be used."""

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML, conversation, drawn, word_tokenizer, words

from gakernels import InputError
from gakernels.data import sources as data_sources
from gakernels.data.bad_records import BadRecords
from gakernels.data.chat import ChatEncoder, TokenLimits, encode_records
from gakernels.data.conversations import ContextRecord, Message, record_of
from gakernels.data.instruction_sources import InstructionSource, read_source
from gakernels.evaluation.datasets import read_squad
from gakernels.evaluation.prompts import demonstration_text, icl_prompt

Row = dict[str, Any]


def one(row: Row) -> ContextRecord:
    bad = BadRecords()
    record = record_of(row, "here", bad)
    assert record is not None
    assert bad.total == 0
    return record


def asked(question: str, answer: str) -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", answer)


def test_conversations_are_taken_as_they_are() -> None:
    first, second = tuple(conversation(2)), tuple(conversation(1, system=True))
    as_json = [[{"role": m.role, "content": f" {m.content}\n"} for m in said] for said in (first, second)]
    assert one({"context": " c ", "messages": as_json[0]}) == ContextRecord("c", (first,))
    assert one({"context": "c", "conversations": as_json, "id": 3}) == ContextRecord("c", (first, second))


@pytest.mark.parametrize(
    "answers",
    [
        {"answers": ["a b", "c"]},
        {"answers": ["", "a b"]},
        {"answers": "a b"},
        {"answer": "a b"},
        {"answers": {"text": ["a b", "c"], "answer_start": [1, 2]}},
        {"answers": [{"text": "a b"}, {"text": "c"}]},
    ],
)
def test_of_the_answers_to_a_question_the_first_is_learned(answers: Row) -> None:
    expected = ContextRecord("c", (asked("q?", "a b"),))
    assert one({"context": "c", "question": "q?", **answers}) == expected
    assert one({"context": "c", "qas": [{"question": "q?", **answers}]}) == expected


def test_demonstrations_are_written_as_the_evaluation_writes_them() -> None:
    pairs = [(words(3), words(1)) for _ in range(5)]
    entries = [{"input": given, "output": wanted} for given, wanted in pairs]
    last = ContextRecord(demonstration_text(pairs[:-1]), (asked(icl_prompt(pairs[-1][0], style="bare"), pairs[-1][1]),))
    assert one({"task": "t", "examples": entries}) == last
    several = one({"task": "t", "examples": entries[:3], "queries": entries[3:]})
    assert several.context == demonstration_text(pairs[:3])
    assert several.conversations == tuple(asked(icl_prompt(given, style="bare"), wanted) for given, wanted in pairs[3:])


def test_the_input_of_an_instruction_is_its_context() -> None:
    assert one({"instruction": "i", "input": "c", "output": "o"}) == ContextRecord("c", (asked("i", "o"),))
    assert one({"instruction": "i", "context": "c", "output": "o"}) == ContextRecord("c", (asked("i", "o"),))


def test_a_context_may_be_a_conversation() -> None:
    said = [{"role": "user", "content": "hello"}, "just a line", {"speaker": "Ann B", "text": "hi"}, {"text": "x"}]
    row = {"context": said, "question": "q", "answer": "a"}
    assert one(row).context == "User: hello\njust a line\nAnn B: hi\nx"


# The forms of TRL, LlamaFactory and Axolotl


TURNS = [("system", "s"), ("user", "hello"), ("assistant", "hi"), ("user", "how?"), ("assistant", "so")]
SAID = tuple(Message(role, content) for role, content in TURNS)


def turns(role: str, content: str, **names: str) -> list[Row]:
    return [{role: names.get(who, who), content: said} for who, said in TURNS]


@pytest.mark.parametrize(
    "entries",
    [
        {"messages": turns("role", "content")},
        {"messages": turns("from", "value", user="human", assistant="gpt")},
        {"conversations": turns("role", "content")},
        {"conversations": turns("from", "value", user="human", assistant="gpt")},
        {"conversations": turns("from", "value", user="Human", assistant="GPT")},
        {"conversations": turns("from", "value")},
        {"conversations": turns("from", "value", user="human", assistant="gpt")[1:], "system": " s "},
        {"conversations": [turns("from", "value", user="human", assistant="gpt")]},
        {"messages": turns("role", "content", system="developer", assistant="model")},
        {"messages": [{**message, "from": None, "value": None} for message in turns("role", "content")]},
        {"prompt": turns("role", "content")[:-1], "completion": turns("role", "content")[-1:]},
        {"prompt": turns("role", "content")[:2], "completion": turns("role", "content")[2:], "system": "not this"},
        {"prompt": turns("role", "content")[:-1], "completion": "so"},
        {"system": "s", "history": [["hello", "hi"]], "instruction": "how?", "output": "so"},
        {"system": "s", "history": [["hello", "hi"]], "instruction": "how?", "response": "so"},
    ],
)
def test_conversations_in_the_forms_of_other_trainers(entries: Row) -> None:
    assert one({"context": "c", **entries}) == ContextRecord("c", (SAID,))


def test_prompts_and_completions_that_are_texts() -> None:
    expected = ContextRecord("c", (asked("q", "a"),))
    for name in ("completion", "response"):
        assert one({"context": "c", "prompt": "q ", name: " a"}) == expected
        assert one({"context": "c", "prompt": [{"type": "text", "text": "q"}], name: ["a"]}) == expected
    with_system = ContextRecord("c", ((Message("system", "s"), *asked("q", "a")),))
    assert one({"context": "c", "prompt": "q", "completion": "a", "system": "s"}) == with_system


def test_what_an_instruction_goes_with() -> None:
    row = {"instruction": "i", "input": "c", "output": "o", "history": [["q", "a"], ["r", "b"]], "system": "s"}
    said = (*asked("q", "a"), *asked("r", "b"), *asked("i", "o"))
    assert one(row) == ContextRecord("c", ((Message("system", "s"), *said),))
    assert one({**row, "history": [], "system": " "}) == ContextRecord("c", (asked("i", "o"),))
    assert one({**row, "history": None, "system": "", "input": "", "context": "d"}).context == "d"
    both = one({"instruction": "i", "input": "n", "context": "c", "output": "o"})
    assert both == ContextRecord("c", (asked("i\nn", "o"),))


@pytest.mark.parametrize("number", [0, 42, -3.5, 10**20])
def test_numbers_are_answers(number: float) -> None:
    expected = ContextRecord("c", (asked("q", str(number)),))
    for answers in ({"answer": number}, {"answers": [number, "x"]}, {"answers": {"text": [number]}}):
        assert one({"context": "c", "question": "q", **answers}) == expected
    assert one({"context": "c", "prompt": "q", "completion": number}) == expected
    assert one({"instruction": "q", "input": "c", "output": number}) == expected
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": number}]
    assert one({"context": "c", "messages": messages}) == expected
    shown = one({"examples": [{"input": 1, "output": 2}, {"input": 3, "output": number}]})
    assert shown == ContextRecord("Input: 1\nOutput: 2", (asked("Input: 3\nOutput:", str(number)),))


def test_content_in_parts() -> None:
    def parts(*texts: str) -> list[Row]:
        return [{"type": "text", "text": text} for text in texts]

    messages = [{"role": "user", "content": parts("q", "r ")}, {"role": "assistant", "content": parts("a")}]
    assert one({"context": parts("c", "d"), "messages": messages}) == ContextRecord("c\nd", (asked("q\nr", "a"),))
    turns = [{"role": "user", "content": parts("x", "y")}, {"from": "gpt", "value": "z"}]
    assert one({"context": turns, "question": "q", "answer": "a"}).context == "User: x\ny\nAssistant: z"


IMAGE = [{"type": "text", "text": "see"}, {"type": "image", "url": "x.png"}]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (
            {"conversations": [{"from": "human", "value": IMAGE}, {"from": "gpt", "value": "a"}]},
            "message whose content is not text",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": None}]},
            "message without content",
        ),
        ({"conversations": [{"from": "function_call", "value": "q"}]}, "message whose role is not system, .*"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]},
            "conversation that does not begin with the user",
        ),
        ({"conversations": [{"from": "human", "value": "q"}, "a"]}, "conversation that is not a list of messages"),
        ({"prompt": "q", "completion": " "}, "message without content"),
        ({"prompt": {"q": 1}, "completion": "a"}, "message whose content is not text"),
        ({"question": "q", "answer": True}, "answer that is neither text nor number"),
        ({"question": "q", "answer": float("nan")}, "question without answers"),
        ({"question": ["q", 3], "answer": "a"}, "question that is not text"),
        ({"instruction": "i", "output": {"o": 1}}, "answer that is neither text nor number"),
        ({"instruction": "i", "output": "o", "history": "before"}, "history that is not a list of .*"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "history that is not a list of .*"),
        ({"instruction": "i", "output": "o", "system": {"s": 1}}, "system message that is not text"),
        ({"examples": [{"input": "a", "output": "b"}, {"input": "c"}, {"input": "d", "output": "e"}]}, "example .*"),
    ],
)
def test_what_is_wrong_with_them_is_said(row: Row, kind: str) -> None:
    bad = BadRecords()
    record = record_of({"context": "c", **row}, "line 3", bad)
    ((found, count),) = bad.counts.items()
    assert re.fullmatch(kind, found)
    assert (count, bad.places[found]) == (1, ["line 3"])
    assert (record is None) == ("examples" not in row)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "nothing else"}, "record of an unknown form"),
        ({"context": "c"}, "record of an unknown form"),
        ({"context": "", "question": "q", "answer": "a"}, "record without context"),
        ({"context": 3, "question": "q", "answer": "a"}, "record without context"),
        ({"instruction": "i", "input": "", "output": "o"}, "record without context"),
        ({"context": "c", "question": "q", "answers": []}, "question without answers"),
        ({"context": "c", "question": "q"}, "question without answers"),
        ({"context": "c", "question": " ", "answer": "a"}, "question without text"),
        ({"context": "c", "qas": []}, "record without questions"),
        ({"context": "c", "qas": ["q"]}, "question without text"),
        ({"context": "c", "conversations": []}, "record without conversation"),
        ({"context": "c", "messages": "hello"}, "conversation that is not a list of messages"),
        ({"context": "c", "messages": []}, "conversation that is not a list of messages"),
        ({"context": "c", "messages": ["hello"]}, "conversation that is not a list of messages"),
        ({"context": "c", "messages": [{"role": "tool", "content": "x"}]}, "message whose role is not system, .*"),
        ({"context": "c", "messages": [{"role": "user", "content": ""}]}, "message without content"),
        (
            {"context": "c", "messages": [{"role": "assistant", "content": "x"}]},
            "conversation that does not begin with the user",
        ),
        (
            {"context": "c", "messages": [{"role": "user", "content": "x"}]},
            "conversation that does not end with the assistant",
        ),
        ({"examples": []}, "record without examples"),
        ({"examples": [{"input": "a", "output": "b"}]}, "record without context"),
    ],
)
def test_rows_that_can_not_be_used_are_counted_with_the_reason(row: Row, kind: str) -> None:
    bad = BadRecords()
    assert record_of(row, "line 7", bad) is None
    ((found, count),) = bad.counts.items()
    assert re.fullmatch(kind, found)
    assert count == 1
    assert bad.places[found] == ["line 7"]
    with pytest.raises(InputError, match="data: line 7: "):
        record_of(row, "line 7", BadRecords(strict=True))


def test_one_bad_question_does_not_cost_the_others() -> None:
    bad = BadRecords()
    row = {
        "context": "c",
        "qas": [{"question": "q", "answer": "a"}, {"question": "q"}, {"question": "r", "answer": "b"}],
    }
    assert record_of(row, "here", bad) == ContextRecord("c", (asked("q", "a"), asked("r", "b")))
    assert bad.counts == {"question without answers": 1}


# Files


def rows(count: int) -> list[Row]:
    return [{"context": f"c{n} {words(5)}", "question": f"q{n} {words(2)}", "answer": words(1)} for n in range(count)]


def as_parquet(path: Path, content: list[Row]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(content), path)


def as_zst(path: Path, content: list[Row]) -> None:
    zstd = pytest.importorskip("backports.zstd")
    path.write_bytes(zstd.compress(lines(content)))


def lines(content: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in content).encode()


WRITERS: dict[str, Callable[[Path, list[Row]], Any]] = {
    "a.jsonl": lambda path, content: path.write_bytes(lines(content)),
    "a.jsonl.gz": lambda path, content: path.write_bytes(gzip.compress(lines(content))),
    "a.ndjson.xz": lambda path, content: path.write_bytes(lzma.compress(lines(content))),
    "a.jsonl.bz2": lambda path, content: path.write_bytes(bz2.compress(lines(content))),
    "a.jsonl.zst": as_zst,
    "a.json": lambda path, content: path.write_text(json.dumps(content)),
    "a.json.gz": lambda path, content: path.write_bytes(gzip.compress(json.dumps(content).encode())),
    "a.parquet": as_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("folder", [False, True])
def test_rows_are_read_from_files_of_every_kind(tmp_path: Path, name: str, folder: bool) -> None:
    content = rows(7)
    WRITERS[name](tmp_path / name, content)
    (tmp_path / "notes.txt").write_text("not data")
    bad = BadRecords()
    records = read_source(InstructionSource(str(tmp_path if folder else tmp_path / name)), bad)
    assert records == [one(row) for row in content]
    assert bad.total == 0


def test_rows_are_read_from_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    content, named = rows(5), []

    def load(*arguments: Any, **options: Any) -> list[Row]:
        named.append((arguments, options["split"], options["streaming"]))
        return content

    monkeypatch.setattr(data_sources, "_hub_loader", lambda: (load, (OSError,)))
    records = read_source(InstructionSource("hub:someone/questions:easy:validation"), BadRecords())
    assert records == [one(row) for row in content]
    assert named == [(("someone/questions", "easy"), "validation", True)]


def test_columns_without_a_value_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    content = [{"context": "c", "question": "q", "answer": "a"}, {"context": "d", "messages": said}]
    as_parquet(tmp_path / "a.parquet", [{"messages": None, "question": None, "answer": None, **row} for row in content])
    assert read_source(InstructionSource(str(tmp_path)), BadRecords(strict=True)) == [one(row) for row in content]


def test_a_squad_file_is_read_as_the_evaluation_reads_it(tmp_path: Path) -> None:
    def qa(n: int) -> Row:
        return {"id": str(n), "question": words(4), "answers": [{"text": words(2), "answer_start": 0}, {"text": "w3"}]}

    data = [
        {
            "title": "t",
            "paragraphs": [{"context": f"{n} {words(9)}", "qas": [qa(n) for _ in range(3)]} for n in range(4)],
        }
        for _ in range(2)
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": data}))
    expected: dict[str, list[Any]] = {}
    for context in read_squad(path).contexts:
        found = [asked(question.text, question.answers[0]) for question in context.questions]
        expected.setdefault(context.text, []).extend(found)
    records = read_source(InstructionSource(str(path)), BadRecords())
    assert {record.context: list(record.conversations) for record in records} == expected


@pytest.mark.parametrize("separator", ["\n", "\n\n"])
def test_a_json_file_may_have_one_row_a_line(tmp_path: Path, separator: str) -> None:
    content = rows(5)
    (tmp_path / "train.json").write_text(separator.join(map(json.dumps, content)))
    assert read_source(InstructionSource(str(tmp_path)), BadRecords(strict=True)) == [one(row) for row in content]


def test_a_json_file_may_have_its_rows_under_data(tmp_path: Path) -> None:
    content, paragraph = rows(3), {"context": "c", "qas": [{"question": "q", "answer": "a"}]}
    (tmp_path / "train {0}.json").write_text(json.dumps({"data": [*content, {"paragraphs": [paragraph, 3]}, 4]}))
    bad = BadRecords()
    assert read_source(InstructionSource(str(tmp_path)), bad) == [one(row) for row in (*content, paragraph)]
    ((kind, places),) = bad.places.items()
    assert kind == "row that is not a JSON object"
    assert [place.split(" of ")[:-1] for place in places] == [["paragraph 2", "row 4"], ["row 5"]]


@pytest.mark.parametrize("bad_rows", [0, 1, 2, 7])
def test_what_is_lost_of_a_source_is_counted_in_rows(tmp_path: Path, bad_rows: int) -> None:
    questions = [{"question": "q", "answer": "a"}, {"question": "r"}, {"question": "s"}, {"question": "t"}]
    broken: list[Row] = [{"context": "c", "qas": questions}, {"text": "x"}] * 4
    (tmp_path / "a.jsonl").write_bytes(lines(rows(12)) + lines(broken[:bad_rows]) + b"[]\n")
    bad = BadRecords()
    read_source(InstructionSource(str(tmp_path)), bad)
    partly = (bad_rows + 1) // 2
    assert bad.records == 13 + bad_rows
    assert bad.lost == pytest.approx(1 + 0.75 * partly + bad_rows - partly)


def test_what_is_lost_of_tasks_is_counted_in_items(tmp_path: Path) -> None:
    items = [{"task": "t", "input": n, "output": "x" if n % 5 else ""} for n in range(20)]
    (tmp_path / "a.jsonl").write_bytes(lines([*items, {"task": "alone", "input": "i", "output": "o"}]))
    bad = BadRecords()
    read_source(InstructionSource(str(tmp_path), shots=4, queries=2), bad)
    assert (bad.records, bad.lost) == (21, 5)
    assert bad.counts == {"example without input or output": 4, "record without context": 1}


def test_conversations_about_the_same_context_come_together(tmp_path: Path) -> None:
    content = rows(3)
    more = [{**content[1], "question": "another"}, content[1]]
    (tmp_path / "a.jsonl").write_bytes(lines([*content, *more]))
    records = read_source(InstructionSource(str(tmp_path)), BadRecords())
    assert len(records) == 3
    assert records[1].conversations == (one(content[1]).conversations[0], one(more[0]).conversations[0])


def test_items_of_tasks_become_demonstrations_and_queries(tmp_path: Path) -> None:
    items = [{"task": f"t{n % 2}", "input": f"{n} {words(2)}", "output": words(1), "options": []} for n in range(21)]
    (tmp_path / "a.jsonl").write_bytes(lines(items))
    source = InstructionSource(str(tmp_path), shots=4, queries=2)
    records = read_source(source, bad := BadRecords(), seed=5)
    texts = {row["input"]: (row["task"], row["output"]) for row in items}
    seen: list[str] = []
    for record in records:
        shown = [part.removeprefix("Input: ").split("\nOutput: ") for part in record.context.split("\n\n")]
        queries = [said[0].content.removeprefix("Input: ").removesuffix("\nOutput:") for said in record.conversations]
        assert len({texts[given][0] for given in [*[given for given, _ in shown], *queries]}) == 1
        assert all(texts[given][1] == wanted for given, wanted in shown)
        assert all(said[1].content == texts[q][1] for q, said in zip(queries, record.conversations, strict=True))
        assert len(shown) == 4 or record.context == records[-1].context or len(queries) == 1
        seen += [given for given, _ in shown] + queries
    # 11 and 10 items: pieces of 6 and 5, of 6 and 4.
    assert sorted(seen) == sorted(texts)
    assert sorted(len(record.conversations) for record in records) == [1, 1, 2, 2]
    assert bad.total == 0
    assert read_source(source, BadRecords(), seed=5) == records
    assert read_source(source, BadRecords(), seed=6) != records


def test_bad_lines_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    content = rows(4)
    text = lines(content[:2]) + b"{broken\n[1, 2]\n\xff\xfe\n\n" + lines(content[2:]) + b'{"context": "c"}\n'
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.json").write_text("[")
    (tmp_path / "c.json").write_text('{"data": 3}')
    (tmp_path / "d.json").write_text("[1]")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines(rows(2000)))[:-9])
    bad = BadRecords()
    records = read_source(InstructionSource(str(tmp_path)), bad)
    assert records[:4] == [one(row) for row in content]
    assert sum(bad.counts.values()) == 8
    assert bad.counts["record of an unknown form"] == 1
    assert bad.counts["file that is not JSON"] == 1
    assert bad.counts["row that is not a JSON object"] == 1
    assert bad.counts["JSON file that is neither a list of rows nor of SQuAD's form"] == 1
    with pytest.raises(InputError, match=r"data: line 3 of .*a\.jsonl: "):
        read_source(InstructionSource(str(tmp_path)), BadRecords(strict=True))


def test_hidden_files_are_left_out_and_counted_but_are_no_loss(tmp_path: Path) -> None:
    content = rows(4)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "a.jsonl").write_bytes(lines(content))
    (tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl").write_bytes(lines(rows(3)))
    (tmp_path / ".b.json").write_text("[")
    bad = BadRecords(strict=True)
    assert read_source(InstructionSource(str(tmp_path)), bad) == [one(row) for row in content]
    assert bad.counts == {"file under a hidden name": 2}
    assert (bad.records, bad.lost, bad.faults) == (4, 0, 0)


def test_a_source_without_a_usable_record_is_refused_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data: there is no file or folder"):
        read_source(InstructionSource(str(tmp_path / "none")), BadRecords())
    with pytest.raises(InputError, match="holds no file that ends in"):
        read_source(InstructionSource(str(tmp_path)), BadRecords())
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    message = r"has no usable record: 2 x record of an unknown form \(first: line 1 of .*, line 2 of .*\)"
    with pytest.raises(InputError, match=message):
        read_source(InstructionSource(str(tmp_path)), BadRecords())


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"weight": float("nan")}, {"shots": 0}, {"queries": 0}])
def test_settings_of_a_source_that_make_no_sense_are_refused(settings: Row) -> None:
    with pytest.raises(InputError, match=f"{next(iter(settings))} must be"):
        InstructionSource("a.jsonl", **settings)


# Tokens and limits


def encode(records: list[ContextRecord], context: int = 100, said: int = 100) -> tuple[Any, BadRecords, BadRecords]:
    bad, shortened = BadRecords(), BadRecords()
    limits = TokenLimits(context, said)
    return encode_records(records, word_tokenizer(CHATML), limits, bad, shortened, progress=False), bad, shortened


def test_a_context_has_the_tokens_of_adapt_and_conversations_those_of_the_template() -> None:
    tokenizer = word_tokenizer(CHATML)
    records = [ContextRecord(words(9), (tuple(conversation(1)), tuple(conversation(3)))) for _ in range(3)]
    examples, bad, shortened = encode(records)
    assert bad.total == shortened.total == 0
    for example, record in zip(examples, records, strict=True):
        assert example.context.tolist() == tokenizer(record.context)["input_ids"]
        for found, messages in zip(example.conversations, record.conversations, strict=True):
            expected: Any = ChatEncoder(tokenizer).encode(messages)
            assert found.tokens.tolist() == expected.tokens.tolist()
            assert found.answers.tolist() == expected.answers.tolist()


def test_contexts_over_the_limit_are_left_out_and_counted() -> None:
    lengths = [drawn(3, 12) for _ in range(20)] + [8, 9]
    records = [ContextRecord(words(length), (tuple(conversation(1)),)) for length in lengths]
    examples, bad, _ = encode(records, context=8)
    assert [len(example.context) for example in examples] == [length for length in lengths if length <= 8]
    assert bad.counts == {"context of more than 8 tokens": sum(length > 8 for length in lengths)}


@pytest.mark.parametrize("system", [False, True])
def test_a_conversation_over_the_limit_keeps_its_last_exchanges(system: bool) -> None:
    tokenizer = word_tokenizer(CHATML)
    messages = tuple(conversation(5, system))
    front = messages[:system]
    ends = [ChatEncoder(tokenizer).encode(front + messages[system + 2 * n :]) for n in range(5)]
    lengths = [len(end.tokens) for end in ends]
    assert lengths == sorted(lengths, reverse=True)
    for number in range(1, 5):
        examples, bad, shortened = encode([ContextRecord("w3", (messages,))], said=lengths[number])
        assert examples[0].conversations[0].tokens.tolist() == ends[number].tokens.tolist()
        assert examples[0].conversations[0].answers.tolist() == ends[number].answers.tolist()
        assert (bad.total, shortened.total) == (0, 1)
    examples, bad, shortened = encode([ContextRecord("w3", (messages,))], said=lengths[-1] - 1)
    assert examples == []
    assert bad.counts == {f"conversation whose last exchange has more than {lengths[-1] - 1} tokens": 1}
    assert shortened.total == 0


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="the limit of a context must be at least 2 tokens, but it is 1"):
        TokenLimits(1, 10)
    with pytest.raises(InputError, match="the limit of a conversation must be at least 2 tokens, but it is 0"):
        TokenLimits(10, 0)
