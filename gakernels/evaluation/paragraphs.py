"""Rows of HotpotQA, MuSiQue and MS MARCO, whose contexts are lists of paragraphs, as flat rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NO_ANSWER = "No Answer Present."  # as MS MARCO writes it


def flat_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of one of these data sets as `{id, context, question, answers}`; any other row as it is.

    The context is all paragraphs of the row in their order, with their titles, separated by empty lines.

    Schemas: HotpotQA `{"_id", "question", "answer", "context": [[title, [sentence]]]}`; MuSiQue `{"id", "question",
    "answer", "answer_aliases", "answerable", "paragraphs": [{"title", "paragraph_text"}]}`; MS MARCO `{"query_id",
    "query", "answers", "passages": [{"passage_text"}]}`. The hub's forms of HotpotQA and MS MARCO, with a list for
    each key (`{"title": [...], "sentences": [...]}`), are read too. Questions without an answer get none.
    """
    if isinstance(row.get("context"), (list, dict)):
        answers, name = [row.get("answer")], row.get("_id", row.get("id"))
        paragraphs = _hotpot_paragraphs(row["context"])
    elif "paragraphs" in row:
        answers = [row.get("answer"), *(row.get("answer_aliases") or ())] if row.get("answerable", True) else []
        paragraphs, name = _titled(_records(row["paragraphs"]), "title", "paragraph_text"), row.get("id")
    elif "passages" in row:
        answers = [answer for answer in row.get("answers") or () if answer != NO_ANSWER]
        paragraphs, name = _titled(_records(row["passages"]), "", "passage_text"), row.get("query_id")
    else:
        return row
    question = row.get("question", row.get("query"))
    flat = {"context": "\n\n".join(filter(None, paragraphs)), "question": question, "answers": answers}
    return flat if name is None else {**flat, "id": name}


def _hotpot_paragraphs(context: Sequence[Any] | Mapping[str, Any]) -> Iterator[str]:
    if isinstance(context, Mapping):
        context = list(zip(context.get("title", ()), context.get("sentences", ()), strict=False))
    for paragraph in context:
        if isinstance(paragraph, (list, tuple)) and len(paragraph) == 2:
            title, sentences = paragraph
            yield _paragraph(title, "".join(sentence for sentence in sentences if isinstance(sentence, str)))


def _titled(records: Iterator[Mapping[str, Any]], title: str, text: str) -> Iterator[str]:
    return (_paragraph(record.get(title), record.get(text)) for record in records)


def _records(listed: Any) -> Iterator[Mapping[str, Any]]:
    """The objects of a list, or of one list for each key."""
    if isinstance(listed, Mapping):
        columns = {name: values for name, values in listed.items() if isinstance(values, (list, tuple))}
        return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=False))
    return (record for record in listed or () if isinstance(record, Mapping))


def _paragraph(title: Any, text: Any) -> str:
    """A title, if there is one, and a text; empty without a text."""
    if not isinstance(text, str) or not text.strip():
        return ""
    return "\n".join(part.strip() for part in (title, text) if isinstance(part, str) and part.strip())
