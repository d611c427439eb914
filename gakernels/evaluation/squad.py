"""Files in the JSON form of SQuAD, and how their paragraphs are grouped to longer contexts (docs/evaluation.md)."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from gakernels.errors import InputError
from gakernels.evaluation.records import (
    Context,
    Dataset,
    Question,
    Skipped,
    dataset,
    list_of,
    text_of,
    texts_of,
)
from gakernels.user_text import read_user_text

PARTS = ("all", "first_tenth")


def read_squad(path: Path) -> Dataset:
    """The paragraphs of a SQuAD file (v1.1; of v2.0 the questions that have answers), each as a context.

    Schema: `{"data": [{"title": str, "paragraphs": [{"context": str, "qas": [{"id": str, "question": str, "answers":
    [{"text": str}]}]}]}]}`; other entries are ignored. Left out and counted: paragraphs without text or questions,
    questions without text or answers.

    Raises:
        InputError: there is no such file, it is no JSON of this form, or nothing is left of it.
    """
    text = read_user_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON, but it is not: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise InputError(f'{path} must be a SQuAD file, a JSON object with a list "data" of articles')
    contexts, skipped = [], Skipped()
    for a, article in enumerate(content["data"]):
        title = text_of(article.get("title")) if isinstance(article, dict) else ""
        paragraphs = list_of(article.get("paragraphs")) if isinstance(article, dict) else []
        if not paragraphs:
            skipped.add("article without paragraphs", f"{path}: data[{a}]")
        for p, paragraph in enumerate(paragraphs):
            place = f"{path}: data[{a}].paragraphs[{p}]"
            context = _context(paragraph, title, place, skipped)
            contexts += [] if context is None else [context]
    return dataset(path, contexts, skipped)


def _context(paragraph: Any, title: str, place: str, skipped: Skipped) -> Context | None:
    text = text_of(paragraph.get("context")) if isinstance(paragraph, dict) else ""
    if not text:
        skipped.add("paragraph without text", place)
        return None
    questions = []
    for q, entry in enumerate(list_of(paragraph.get("qas"))):
        question = _question(entry, f"{place}.qas[{q}]", skipped)
        questions += [] if question is None else [question]
    if not questions:
        skipped.add("paragraph without questions", place)
        return None
    return Context(text, tuple(questions), title)


def _question(entry: Any, place: str, skipped: Skipped) -> Question | None:
    entry = entry if isinstance(entry, dict) else {}
    text = text_of(entry.get("question"))
    answers = texts_of([answer.get("text") for answer in list_of(entry.get("answers")) if isinstance(answer, dict)])
    if not text or not answers:
        skipped.add("question without answers" if text else "question without text", place)
        return None
    return Question(text, answers, id=str(entry.get("id", "")))


def group_contexts(
    contexts: Iterable[Context], length: int, measure: Callable[[str], int] = len, part: str = "all"
) -> list[Context]:
    """Contexts of about `length`, each of consecutive documents with all their questions (section 4.1 of the paper).

    As in the authors' released code: documents of the same text count once, ceil(total / length) groups get equally
    many documents (the first ones one more), and the texts are joined by empty lines.

    Args:
        contexts: documents with their questions.
        length: average length of a group.
        measure: of a text: `len` for characters, or a function that counts tokens.
        part: `all` groups, or the `first_tenth`, which is all that the released code scores.

    Raises:
        InputError: length is below 1, or there is no such part.
    """
    if length < 1:
        raise InputError(f"length must be at least 1, but it is {length}")
    if part not in PARTS:
        raise InputError(f"part must be one of {', '.join(PARTS)}, but it is {part!r}")
    documents = _by_text(contexts)
    count = math.ceil(measure("\n\n".join(document.text for document in documents)) / length)
    scored = count if part == "all" else max(1, count // 10)
    groups = _split_evenly(documents, count)[:scored]
    return [_join(group) for group in groups if group]  # documents longer than `length` leave groups empty


def _by_text(contexts: Iterable[Context]) -> list[Context]:
    merged: dict[str, Context] = {}
    for context in contexts:
        before = merged.get(context.text, Context(context.text, (), context.name))
        merged[context.text] = Context(context.text, before.questions + context.questions, before.name)
    return list(merged.values())


def _split_evenly(documents: Sequence[Context], count: int) -> list[Sequence[Context]]:
    size, more = divmod(len(documents), count)
    bounds = [size * n + min(n, more) for n in range(count + 1)]
    return [documents[start:end] for start, end in pairwise(bounds)]


def _join(group: Sequence[Context]) -> Context:
    names = dict.fromkeys(context.name for context in group)
    questions = tuple(question for context in group for question in context.questions)
    return Context("\n\n".join(context.text for context in group), questions, ", ".join(names))
