"""StreamingQA's questions joined with the articles of the WMT News Crawls that they are about, as flat rows."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gakernels.data.bad_records import BadRecords
from gakernels.data.compression import opened
from gakernels.data.records import Record, read_records
from gakernels.errors import InputError
from gakernels.evaluation.datasets import because, flat_answers, text_of

_SEPARATOR = "\0\1"  # between the parts of an article's name
_MIDNIGHT = "0" * 12  # hours, minutes, seconds and microseconds of a date


def join_streaming_qa(
    questions: Path, crawls: Sequence[Path], progress: bool = False
) -> tuple[list[dict[str, Any]], BadRecords]:
    """Rows `{id, context, question, answers}`, in the order of the questions.

    An article has no name in the crawls. StreamingQA names it by its date and the SHA-256 of its unsplit text in
    Base64, as `evidence_id`. Its text is the one that is split into sentences, as in StreamingQA's own script.

    Args:
        questions: `streaminqa_train.jsonl.gz`, `..._valid...` or `..._eval...`, compressed or not.
        crawls: `news-docs.YEAR.en.filtered.gz`, compressed or not, of all years that are asked about.
        progress: whether to show a bar of the articles found.

    Returns:
        The rows, and what was left out: questions without text, answers or article, articles that can't be read.

    Raises:
        InputError: there is no such file, or nothing is left.
        OSError: a file is damaged.
    """
    for path in (questions, *crawls):
        if not path.is_file():
            raise InputError(f"there is no file {path}")
    skipped = BadRecords()
    asked = list(read_records(questions, skipped))
    wanted = {text_of(record.entries.get("evidence_id")) for record in asked} - {""}
    rows = list(_rows(asked, _articles(crawls, wanted, skipped, progress), skipped))
    if not rows:
        raise InputError(f"{questions} has no question whose article is in the files{because(skipped)}")
    return rows, skipped


def _rows(asked: Iterable[Record], articles: dict[str, str], skipped: BadRecords) -> Iterator[dict[str, Any]]:
    for record in asked:
        entries = record.entries
        context, question = articles.get(text_of(entries.get("evidence_id"))), text_of(entries.get("question"))
        answers = flat_answers(entries)
        if not question or not answers:
            skipped.add(f"question without {'answers' if question else 'text'}", record.place)
        elif not context:
            skipped.add("question whose article is in none of the files", record.place)
        else:
            name = str(entries.get("qa_id", record.place))
            yield {"id": name, "context": context, "question": question, "answers": list(answers)}


def _articles(crawls: Sequence[Path], wanted: Collection[str], skipped: BadRecords, progress: bool) -> dict[str, str]:
    """The texts of the wanted articles, by name. Only articles of a wanted date are hashed."""
    found: dict[str, str] = {}
    dates = {name[:8].encode() for name in wanted}
    with tqdm(total=len(wanted), desc="articles", unit="article", disable=None if progress else True) as bar:
        for path in crawls:
            bar.set_postfix_str(path.name)
            with opened(path) as file:
                for number, line in enumerate(file, 1):
                    if line[:8] in dates:
                        _add_article(line, f"{path}:{number}", wanted, found, skipped)
                        bar.update(len(found) - bar.n)
            if len(found) == len(wanted):
                break
    return found


def _add_article(line: bytes, place: str, wanted: Collection[str], found: dict[str, str], skipped: BadRecords) -> None:
    """Keep the article of a line `date, split text, unsplit text` (Base64, tabs between them) if it is wanted."""
    try:
        date, split, unsplit = line.strip().split(b"\t")
        digest = hashlib.sha256(unsplit).hexdigest()
        name = _SEPARATOR.join((date.decode() + _MIDNIGHT, digest, ""))
        if name in wanted and name not in found:
            found[name] = base64.b64decode(split, validate=True).decode().strip()
    except ValueError:
        skipped.add("article that is not a date and two texts in Base64", place)
