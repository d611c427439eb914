"""Readers of data sets: every file becomes contexts with questions and gold answers (docs/evaluation.md)."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gakernels.data.bad_records import BadRecords
from gakernels.data.compression import kind_of
from gakernels.data.records import read_records
from gakernels.data.sources import HUB, HubSource, source_of
from gakernels.errors import InputError, check_known
from gakernels.evaluation.paragraphs import flat_row
from gakernels.user_text import read_user_text


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        text: what is asked; the input of a task, or the conversation so far.
        answers: gold answers, at least one.
        options: answers to choose from; empty if the answer is free.
        id: its name in the data set.
        category: its kind, which has results of its own; empty if there are none.
    """

    text: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    id: str = ""
    category: str = ""


@dataclass(frozen=True)
class EvaluationContext:
    """A text to read, and the questions asked about it afterwards.

    Attributes:
        text: the context.
        questions: at least one.
        name: its origin: the title of an article, a line of a file.
    """

    text: str
    questions: tuple[Question, ...]
    name: str = ""


@dataclass(frozen=True)
class Dataset:
    """A data set as read: its contexts, at least one, and the records that were left out."""

    contexts: tuple[EvaluationContext, ...]
    skipped: BadRecords = field(default_factory=BadRecords)

    @property
    def questions(self) -> tuple[Question, ...]:
        """The questions of all contexts."""
        return tuple(question for context in self.contexts for question in context.questions)


Contexts = Iterator[EvaluationContext]
Turns = Sequence[tuple[str, str]]  # a conversation: speaker and text of each turn


# Shared by the readers


def _dataset(path: Path, contexts: Iterable[EvaluationContext], skipped: BadRecords) -> Dataset:
    """What a reader returns; InputError if nothing is left of the file."""
    read = tuple(contexts)
    if not read:
        raise InputError(f"{path} has no context with a question and an answer{because(skipped)}")
    return Dataset(read, skipped)


def because(skipped: BadRecords) -> str:
    """What was left out, worded as the end of a message."""
    return f": {skipped}" if skipped.total else ""


def _json(path: Path) -> Any:
    """The value in a JSON file."""
    text = read_user_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON, but it is not: {error}") from error


def json_lines(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and object of each line that is not empty; None for a line that is not a JSON object."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield number, value if isinstance(value, dict) else None


def _json_objects(path: Path, skipped: BadRecords) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place."""
    # Not splitlines: a text may hold other separators.
    for number, entry in json_lines(read_user_text(path).split("\n")):
        if entry is None:
            skipped.add("line that is not a JSON object", f"{path}:{number}")
        else:
            yield f"{path}:{number}", entry


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file by column name, each with the line that it ends on; short rows get empty cells.

    Raises:
        InputError: as `read_user_text`; a column is missing, or it is not CSV.
    """
    reader = csv.DictReader(io.StringIO(read_user_text(path), newline=""), strict=True, restval="")
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise InputError(f"{path} must have the columns {', '.join(columns)}, but {missing[0]!r} is missing")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num} is not CSV: {error}") from error


def text_of(value: object) -> str:
    """A stripped text; empty for anything that is not a text."""
    return value.strip() if isinstance(value, str) else ""


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def dict_of(value: object) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    return value if isinstance(value, dict) else {}


def _texts(value: object) -> tuple[str, ...]:
    """The non-empty texts of a list."""
    return tuple(filter(None, map(text_of, _list(value))))


def _first_empty(parts: Mapping[str, object]) -> str | None:
    return next((name for name, value in parts.items() if not value), None)


def _questions(
    entry: dict[str, Any], key: str, place: str, skipped: BadRecords, answers: Callable[[Any], tuple[str, ...]]
) -> tuple[Question, ...]:
    """The questions listed under a key that have a text and an answer."""
    found = []
    for number, asked in enumerate(map(dict_of, _list(entry.get(key)))):
        where, text, golds = f"{place}.{key}[{number}]", text_of(asked.get("question")), answers(asked)
        if text and golds:
            found.append(Question(text, golds, id=str(asked.get("id", where)), category=_category(asked)))
        else:
            skipped.add("question without answers" if text else "question without text", where)
    return tuple(found)


def _category(asked: Mapping[str, Any]) -> str:
    """The category of a question, a text or a number."""
    value = asked.get("category")
    return str(value) if isinstance(value, int) else text_of(value)


# Documents


def read_documents(name: str) -> Dataset:
    """Documents with questions, in the form of the file: SQuAD's, StreamingQA's or flat rows.

    Args:
        name: a file, or a data set of the hub as for `read_flat_qa`.

    Raises:
        InputError: see the reader of that form.
    """
    path = Path(name)
    if not name.startswith(HUB) and kind_of(path) in (".json", ".csv"):
        text = read_user_text(path)
        if kind_of(path) == ".json" and text.lstrip().startswith("{"):
            return read_squad(path)
        if kind_of(path) == ".csv" and "text" in text.partition("\n")[0].strip().split(","):
            return read_streaming_qa(path)
    return read_flat_qa(name)


def read_squad(path: Path) -> Dataset:
    """The paragraphs of a SQuAD file (v1.1; of v2.0 the questions that have answers), each as a context.

    Schema: `{"data": [{"title": str, "paragraphs": [{"context": str, "qas": [{"id": str, "question": str, "answers":
    [{"text": str}]}]}]}]}`; other entries are ignored. Left out and counted: paragraphs without text or questions,
    questions without text or answers.

    Raises:
        InputError: there is no such file, it is not JSON of this form, or nothing is left of it.
    """
    content = _json(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise InputError(f'{path} must be a SQuAD file, a JSON object with a list "data" of articles')
    skipped = BadRecords()
    return _dataset(path, _squad_paragraphs(content["data"], path, skipped), skipped)


def _squad_paragraphs(articles: list[Any], path: Path, skipped: BadRecords) -> Contexts:
    for a, article in enumerate(map(dict_of, articles)):
        paragraphs = _list(article.get("paragraphs"))
        if not paragraphs:
            skipped.add("article without paragraphs", f"{path}: data[{a}]")
        for p, paragraph in enumerate(map(dict_of, paragraphs)):
            place, text = f"{path}: data[{a}].paragraphs[{p}]", text_of(paragraph.get("context"))
            questions = _questions(paragraph, "qas", place, skipped, _squad_answers) if text else ()
            if questions:
                yield EvaluationContext(text, questions, text_of(article.get("title")))
            else:
                skipped.add("paragraph without questions" if text else "paragraph without text", place)


def _squad_answers(asked: dict[str, Any]) -> tuple[str, ...]:
    return _texts([dict_of(answer).get("text") for answer in _list(asked.get("answers"))])


STREAMING_QA_COLUMNS = ("text", "question", "answers")


def read_streaming_qa(path: Path) -> Dataset:
    """The articles of a StreamingQA file, each as a context with one question.

    Schema: CSV with the columns `text` (the article), `question` and `answers` (separated by backslashes); others
    are ignored. StreamingQA itself has questions without their articles, which come from the WMT news crawls; this is
    the form that joins both, and that the authors' code reads. Rows about the same article become one context
    in `scenarios.group_contexts`. Left out and counted: rows without text, question or answers.

    Raises:
        InputError: there is no such file, a column is missing, it is not CSV, or nothing is left.
    """
    skipped = BadRecords()
    return _dataset(path, _streaming_qa_rows(path, skipped), skipped)


def _streaming_qa_rows(path: Path, skipped: BadRecords) -> Contexts:
    for line, row in _csv_rows(path, STREAMING_QA_COLUMNS):
        text, question, answers = (row[column].strip() for column in STREAMING_QA_COLUMNS)
        golds = tuple(filter(None, map(str.strip, answers.split("\\"))))
        empty, name = _first_empty({"text": text, "question": question, "answers": golds}), f"{path.name}:{line}"
        if empty:
            skipped.add(f"row without {empty}", f"{path}:{line}")
        else:
            yield EvaluationContext(text, (Question(question, golds, id=name),), name)


FLAT_QA_COLUMNS = ("context", "question")


def read_flat_qa(name: str) -> Dataset:
    """The contexts of flat rows `{context, question, answer}`, with all questions of each.

    `answers` may stand for `answer`; either is a text, a number, a list of them, or SQuAD's `{"text": [...]}`. A row
    may have several questions: `{context, qas: [{question, answer}, ...]}`. A question may have a `category`, whose
    results are also reported apart. Other entries are ignored. Rows of HotpotQA, MuSiQue and MS MARCO are read as they
    are published (`paragraphs.flat_row`). Left out and counted: rows without a context, a question or an answer.

    Args:
        name: a file of JSON (a list of rows), JSON lines, Parquet (both also compressed) or CSV, by its suffix, or
            `hub:` and the name of a data set, as `hub:owner/name:split`.

    Raises:
        InputError: there is no such file, it does not have the form of its suffix, or nothing is left.
    """
    by_context: dict[str, list[Question]] = {}
    skipped = BadRecords()
    rows = ((place, flat_row(row)) for place, row in _flat_rows(name, skipped))
    for place, row in _one_question_each(rows, skipped):
        context, question, answers = text_of(row.get("context")), text_of(row.get("question")), flat_answers(row)
        empty = _first_empty({"context": context, "question": question, "answer": answers})
        if empty:
            skipped.add(f"row without {empty}", place)
        else:
            asked = Question(question, answers, id=str(row.get("id", place)), category=_category(row))
            by_context.setdefault(context, []).append(asked)
    contexts = (EvaluationContext(text, tuple(found), found[0].id) for text, found in by_context.items())
    return _dataset(Path(name), contexts, skipped)


def _one_question_each(
    rows: Iterable[tuple[str, Mapping[str, Any]]], skipped: BadRecords
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, row in rows:
        if "qas" not in row:
            yield place, row
        elif not row["qas"]:
            skipped.add("row without questions", place)
        else:
            for number, asked in enumerate(map(dict_of, _list(row["qas"])), 1):
                yield f"question {number} of {place}", {**asked, "context": row.get("context")}


def flat_answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The gold answers of a row, as texts."""
    value = next((row[name] for name in ("answers", "answer") if row.get(name) is not None), None)
    value = value.get("text") if isinstance(value, Mapping) else value
    listed = value if isinstance(value, (list, tuple)) else [value]
    texts = (str(one) if isinstance(one, (int, float)) else text_of(one) for one in listed)
    return tuple(dict.fromkeys(filter(None, texts)))


def _flat_rows(name: str, skipped: BadRecords) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The place and the entries of each row."""
    if name.startswith(HUB):
        hub = source_of(name)
        assert isinstance(hub, HubSource)
        yield from ((record.place, record.entries) for record in hub.rows())
        return
    path = Path(name)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if kind_of(path) == ".csv":
        yield from ((f"{path}:{line}", row) for line, row in _csv_rows(path, FLAT_QA_COLUMNS))
    elif kind_of(path) == ".json":
        yield from _json_rows(path, skipped)
    else:
        yield from ((record.place, record.entries) for record in read_records(path, skipped))


def _json_rows(path: Path, skipped: BadRecords) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = _json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path} must be a list of rows {{context, question, answer}}, or a SQuAD file")
    for number, row in enumerate(rows, 1):
        place = f"row {number} of {path}"
        if isinstance(row, dict):
            yield place, row
        else:
            skipped.add("row that is not a JSON object", place)


# Conversations


def conversation(turns: Turns) -> str:
    """Turns, one per line."""
    return "\n".join(f"{speaker}: {text}" for speaker, text in turns)


def _response_questions(turns: Turns, name: str) -> tuple[Question, ...]:
    """For every turn but the first: the conversation so far and the speaker; the gold answer is what was said."""
    return tuple(
        Question(f"{conversation(turns[:n])}\n{speaker}:", (text,), id=f"{name}/{n}")
        for n, (speaker, text) in enumerate(turns)
        if n > 0
    )


def _recall_questions(personas: Iterable[tuple[str, Sequence[str]]], name: str) -> tuple[Question, ...]:
    """Asks what is known of each speaker; the gold answer is all sentences of the persona together."""
    return tuple(
        Question(f"What is known about {speaker}?", (" ".join(sentences),), id=f"{name}/{speaker}")
        for speaker, sentences in personas
        if sentences
    )


MSC_QUESTIONS = ("self_instruct", "response", "recall")
MSC_SPEAKERS = ("Speaker 1", "Speaker 2")


def read_msc(path: Path, questions: str = "self_instruct") -> Dataset:
    """The conversations of Multi-Session Chat as ParlAI ships it, and of MSC-Self-Instruct, which adds a question.

    Schema of a line: `{"previous_dialogs": [{"dialog": [{"text": str}]}], "dialog": [{"text": str, "id": str}],
    "personas": [[str], [str]], "self_instruct": {"B": str, "A": str}}`; turns without an `id` belong alternately to
    Speaker 1 and Speaker 2. Left out and counted: lines that are not JSON objects, without earlier sessions, or without
    what the questions need.

    Args:
        path: the file.
        questions: `self_instruct`: question B with answer A about all sessions (MemGPT's deep memory retrieval; the
            paper's protocol); `response`: each turn of the last session, after the earlier ones; `recall`: the personas
            that annotators wrote as summaries, after the earlier sessions.

    Raises:
        InputError: there is no such file or kind of question, or nothing is left of the file.
    """
    check_known("questions", questions, MSC_QUESTIONS)
    skipped = BadRecords()
    return _dataset(path, _msc_conversations(path, questions, skipped), skipped)


def _msc_conversations(path: Path, questions: str, skipped: BadRecords) -> Contexts:
    for place, entry in _json_objects(path, skipped):
        sessions = [turns for turns in map(_msc_turns, _list(entry.get("previous_dialogs"))) if turns]
        last, name = _msc_turns(entry), place.rpartition("/")[2]
        asked = _msc_questions(entry, last, name, questions)
        if not sessions:
            skipped.add("line without earlier sessions", place)
        elif not asked:
            skipped.add(f"line without what {questions} questions need", place)
        else:
            read = [*sessions, last] if questions == "self_instruct" and last else sessions
            yield EvaluationContext("\n\n".join(map(conversation, read)), asked, name)


def _msc_turns(session: Any) -> Turns:
    """The non-empty turns of a session."""
    spoken = [
        (text_of(turn.get("id")) or MSC_SPEAKERS[n % 2], text_of(turn.get("text")))
        for n, turn in enumerate(_list(dict_of(session).get("dialog")))
        if isinstance(turn, dict)
    ]
    return [(speaker, text) for speaker, text in spoken if text]


def _msc_questions(entry: dict[str, Any], last: Turns, name: str, kind: str) -> tuple[Question, ...]:
    if kind == "response":
        return _response_questions(last, name)
    if kind == "recall":
        return _recall_questions(zip(MSC_SPEAKERS, map(_texts, _list(entry.get("personas"))), strict=False), name)
    asked, answer = (text_of(dict_of(entry.get("self_instruct")).get(key)) for key in ("B", "A"))
    return (Question(asked, (answer,), id=name),) if asked and answer else ()


PERSONA_CHAT_QUESTIONS = ("recall", "response")
PERSONA_CHAT_USERS = ("User 1", "User 2")
PERSONA_CHAT_COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")


def read_persona_chat(path: Path, questions: str = "recall") -> Dataset:
    """The conversations of a Synthetic-Persona-Chat file.

    Schema: CSV with the columns `user 1 personas` and `user 2 personas` (one sentence per line) and `Best Generated
    Conversation` (lines that begin with "User 1:" or "User 2:"; others continue the turn before them). Left out and
    counted: rows without a conversation or without personas.

    Args:
        path: the file.
        questions: `recall`: the context is the conversation, and both personas are asked for; `response`: the context
            is both personas, and each turn of the conversation is asked for.

    Raises:
        InputError: there is no such file or kind of question, a column is missing, it is not CSV, or nothing is left.
    """
    check_known("questions", questions, PERSONA_CHAT_QUESTIONS)
    skipped = BadRecords()
    return _dataset(path, _persona_chat_rows(path, questions, skipped), skipped)


def _persona_chat_rows(path: Path, questions: str, skipped: BadRecords) -> Contexts:
    for line, row in _csv_rows(path, PERSONA_CHAT_COLUMNS):
        name, turns = f"{path.name}:{line}", _persona_chat_turns(row[PERSONA_CHAT_COLUMNS[2]])
        personas = [
            (user, [sentence.strip() for sentence in row[column].split("\n") if sentence.strip()])
            for user, column in zip(PERSONA_CHAT_USERS, PERSONA_CHAT_COLUMNS, strict=False)
        ]
        if len(turns) < 2:
            skipped.add("row without a conversation", f"{path}:{line}")
        elif not any(sentences for _, sentences in personas):
            skipped.add("row without personas", f"{path}:{line}")
        elif questions == "recall":
            yield EvaluationContext(conversation(turns), _recall_questions(personas, name), name)
        else:
            known = "\n\n".join(f"{user}: {' '.join(sentences)}" for user, sentences in personas if sentences)
            yield EvaluationContext(known, _response_questions(turns, name), name)


def _persona_chat_turns(text: str) -> Turns:
    turns: list[tuple[str, str]] = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        speaker, colon, said = line.partition(":")
        if colon and speaker in PERSONA_CHAT_USERS:
            turns.append((speaker, said.strip()))
        elif turns:
            turns[-1] = (turns[-1][0], f"{turns[-1][1]} {line}".strip())
    return [(speaker, said) for speaker, said in turns if said]


_LOCOMO_SESSION = re.compile(r"session_(\d+)")
# The numbers in its files; the order and the names are those of its paper's tables and evaluation.
_LOCOMO_CATEGORIES = {
    "1": "multi-hop",
    "2": "temporal",
    "3": "open-domain",
    "4": "single-hop",
    "5": "adversarial",
}


def read_locomo(path: Path) -> Dataset:
    """The conversations of a LoCoMo file, over many sessions, with their questions.

    Schema: `[{"sample_id", "conversation": {"session_1_date_time": str, "session_1": [{"speaker", "text",
    "blip_caption"}], ...}, "qa": [{"question", "answer", "category"}]}]`. Each session follows its date; the caption of
    an image that a turn shares follows its text, as "[image: a photo of a dog]". Left out and counted: entries without
    sessions or questions, questions without text or answer (LoCoMo's adversarial ones have none).

    Raises:
        InputError: there is no such file, it is not JSON of this form, or nothing is left of it.
    """
    content = _json(path)
    if not isinstance(content, list):
        raise InputError(f"{path} must be a LoCoMo file, a JSON list of conversations")
    skipped = BadRecords()
    return _dataset(path, _locomo_conversations(content, path, skipped), skipped)


def _locomo_conversations(entries: list[Any], path: Path, skipped: BadRecords) -> Contexts:
    for number, entry in enumerate(map(dict_of, entries)):
        place, text = f"{path}[{number}]", _locomo_sessions(dict_of(entry.get("conversation")))
        questions = tuple(
            replace(question, category=_LOCOMO_CATEGORIES.get(question.category, question.category))
            for question in _questions(entry, "qa", place, skipped, flat_answers)
        )
        if text and questions:
            yield EvaluationContext(text, questions, str(entry.get("sample_id", number)))
        else:
            skipped.add("entry without questions" if text else "entry without sessions", place)


def _locomo_sessions(sessions: dict[str, Any]) -> str:
    """The sessions in the order of their numbers, separated by empty lines."""
    found = {int(match[1]): turns for name, turns in sessions.items() if (match := _LOCOMO_SESSION.fullmatch(name))}
    texts = []
    for number in sorted(found):
        turns = map(dict_of, _list(found[number]))
        spoken = [(text_of(turn.get("speaker")), _locomo_said(turn)) for turn in turns]
        said = conversation([(speaker, text) for speaker, text in spoken if speaker and text])
        if said:
            texts.append("\n".join(filter(None, (text_of(sessions.get(f"session_{number}_date_time")), said))))
    return "\n\n".join(texts)


def _locomo_said(turn: dict[str, Any]) -> str:
    """The text of a turn, and the caption of the image that it shares."""
    caption = text_of(turn.get("blip_caption"))
    return " ".join(filter(None, (text_of(turn.get("text")), caption and f"[image: {caption}]")))


# In-context learning


METAICL_SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Task:
    """The items of one file, at least one.

    Attributes:
        name: of the task.
        items: each with one gold answer, and with options if the task has them.
        skipped: what was left out.
    """

    name: str
    items: tuple[Question, ...]
    skipped: BadRecords = field(default_factory=BadRecords)

    @property
    def is_classification(self) -> bool:
        """Whether all items have the same options: then the score is macro-F1, otherwise accuracy."""
        options = {frozenset(item.options) for item in self.items}
        return len(options) == 1 and options != {frozenset()}


def task_file(folder: Path, task: str, split: str, seed: int, shots: int = 16) -> Path:
    """Where MetaICL keeps a task: `TASK/TASK_16_SEED_SPLIT.jsonl`.

    Raises:
        InputError: there is no such split.
    """
    check_known("split", split, METAICL_SPLITS)
    return folder / task / f"{task}_{shots}_{seed}_{split}.jsonl"


def read_task(path: Path) -> Task:
    """The items of a MetaICL task file.

    Schema of a line: `{"task": str, "input": str, "output": str, "options": [str]}`; task and options may be missing.
    Left out and counted: lines that are not JSON objects, without input or output, or whose output is not an option.

    Raises:
        InputError: there is no such file, nothing is left of it, or it mixes tasks.
    """
    items: list[Question] = []
    names: set[str] = set()
    skipped = BadRecords()
    for place, entry in _json_objects(path, skipped):
        given, wanted, options = text_of(entry.get("input")), text_of(entry.get("output")), _texts(entry.get("options"))
        empty = _first_empty({"input": given, "output": wanted})
        if empty:
            skipped.add(f"item without {empty}", place)
        elif options and wanted not in options:
            skipped.add("item whose output is not among its options", place)
        else:
            names.add(text_of(entry.get("task")))
            items.append(Question(given, (wanted,), options, id=str(len(items))))
    if not items:
        raise InputError(f"{path} has no item with input and output{because(skipped)}")
    if len(names) > 1:
        raise InputError(f"{path} must hold one task, but it holds {', '.join(sorted(names))}")
    return Task(names.pop() or path.stem, tuple(items), skipped)
