"""Scenario: perplexity of the context itself (reconstruction) and of the text after it (completion).

This is the metric of the paper's ablation. n tokens of a document are the context, as text; their windows and those
of the next n tokens are scored. The first token of a window is never predicted, whatever precedes it, so that
all methods score the same tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count
from operator import itemgetter
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gakernels.data.bad_records import BadRecords
from gakernels.data.compression import opened
from gakernels.errors import InputError, check_known, check_least
from gakernels.evaluation.datasets import EvaluationContext, Question, because, dict_of, json_lines, text_of
from gakernels.evaluation.metrics import PROTOCOLS, Sample
from gakernels.evaluation.scenarios import (
    Answers,
    Cell,
    EvaluationCase,
    EvaluationRequest,
    Measurements,
    Scenario,
    draw_rank,
    with_others,
)
from gakernels.model.windows import split_evenly
from gakernels.user_text import decode_user_text, utf8_lines

PARTS = ("reconstruction", "completion")
NAMES = {part: f"{part}_perplexity" for part in PARTS}


@dataclass(frozen=True)
class CutDocument:
    """A piece of a document.

    Attributes:
        name: its origin.
        text: the context.
        context: its token ids.
        following: those of the text that follows.
        document: name of the document, if other pieces of it may be scored too.
    """

    name: str
    text: str
    context: tuple[int, ...]
    following: tuple[int, ...]
    document: str | None = None


def cut_documents(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    limit: int | None = None,
    seed: int = 0,
    pieces: int = 1,
) -> tuple[list[CutDocument], BadRecords]:
    """Pieces of 2 n tokens of documents: n of context, then n that follow.

    Args:
        path: JSON lines (`.jsonl`), each a document with a `text`; or plain text, which is cut into pieces of
            2 n consecutive tokens. May be compressed (`.gz`, `.xz`, `.bz2`, `.zst`).
        tokenizer: of the model.
        tokens: n, at least 2.
        limit: most pieces, drawn at random from all; None for all.
        seed: of the draws, which depend on it and on the texts alone.
        pieces: most pieces of a document in JSON lines: with 1 its start, with more pieces drawn at random.

    Returns:
        The pieces, and what was left out: records without text, documents that are too short (with a limit some of
        these are not noticed).

    Raises:
        InputError: n is below 2, the limit or the number of pieces below 1, or there are to be several pieces of a
            document but the file is plain text; the file is missing, not text, or has no document that is long enough.
    """
    check_least(2, tokens=tokens)
    check_least(1, limit=limit, pieces=pieces)
    plain, order = _is_plain(path), count()
    if plain and pieces > 1:
        raise InputError(f"pieces must be 1 for plain text, of which all pieces are scored, but it is {pieces}")
    drawn: list[tuple[int, int, CutDocument]] = []  # a heap; the one with the highest rank comes first
    skipped = BadRecords()
    for name, text in document_texts(path, skipped):
        starts = not plain and pieces == 1
        if starts and len(drawn) == limit and draw_rank(seed, text) > -drawn[0][0]:
            continue  # before it is cut into tokens
        found = [
            (draw_rank(seed, text if starts else each.text), each) for each in _pieces(name, text, tokenizer, tokens)
        ]
        if not found:
            skipped.add(f"document of fewer than {2 * tokens} tokens", name)
        if starts:
            found = found[:1]
        elif not plain:
            chosen = sorted(rank for rank, _ in found)[:pieces]
            found = [(rank, replace(each, document=name)) for rank, each in found if rank in chosen]
        for rank, piece in found:
            heappush(drawn, (-rank, next(order), piece))
            if limit is not None and len(drawn) > limit:
                heappop(drawn)
    documents = [document for _, _, document in sorted(drawn, key=itemgetter(1))]
    if not documents:
        raise InputError(f"{path} has no document of {2 * tokens} tokens{because(skipped)}")
    return documents, skipped


def _pieces(name: str, text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[CutDocument]:
    """A text in pieces of 2 n tokens, the rest left out."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
    pieces = []
    for start in range(0, len(ids) - 2 * tokens + 1, 2 * tokens):
        middle, end = start + tokens, start + 2 * tokens
        context = text[offsets[start][0] : offsets[middle - 1][1]]
        if context.strip():
            place = f"{name}+{start}" if start else name
            pieces.append(CutDocument(place, context, tuple(ids[start:middle]), tuple(ids[middle:end])))
    return pieces


def document_texts(path: Path, skipped: BadRecords) -> Iterator[tuple[str, str]]:
    """The names and texts of the documents in a file, see `cut_documents`.

    Raises:
        InputError: the file is missing, can't be read, or is not text.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with opened(path) as file:
            if _is_plain(path):
                yield path.name, decode_user_text(file.read(), path)
                return
            for number, entry in json_lines(_decoded(utf8_lines(file), path)):
                text = text_of(dict_of(entry).get("text"))
                if text:
                    yield f"{path.name}:{number}", text
                else:
                    skipped.add("line without a text", f"{path}:{number}")
    except OSError as error:
        raise InputError(f"{path} can't be read: {error}") from error


def _is_plain(path: Path) -> bool:
    return ".jsonl" not in path.suffixes


def _decoded(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            place = f"{path}:{number}"
            raise InputError(f"{place} must be UTF-8 text, but byte {error.start} of the line is wrong") from error


def perplexity(documents: Sequence[CutDocument], window_size: int, protocol: str = "official") -> Scenario:
    """The scenario.

    Args:
        documents: with at least two tokens of context and of what follows it. Intervals resample documents, whole.
        window_size: most tokens scored together.
        protocol: `official`: all tokens count equally; `released`: all documents do.

    Raises:
        InputError: there is no document, a part has fewer than two tokens, or there is no such protocol.
    """
    check_known("protocol", protocol, PROTOCOLS)
    if not documents or any(len(part) < 2 for document in documents for part in (document.context, document.following)):
        raise InputError("there must be at least one document, and at least two tokens of context and of what follows")
    pieces = [
        [
            (part, piece)
            for part, tokens in zip(PARTS, (document.context, document.following), strict=True)
            for piece in split_evenly(tokens, window_size)
        ]
        for document in documents
    ]
    contexts = [
        EvaluationContext(document.text, tuple(Question(part, ("",)) for part, _ in parts), document.name)
        for document, parts in zip(documents, pieces, strict=True)
    ]
    cases = with_others([EvaluationCase(context) for context in contexts])

    def ask(number: int, case: EvaluationCase) -> list[EvaluationRequest]:
        return [
            EvaluationRequest(number, place, query=case.context.text, continuation=tuple(piece))
            for place, (_, piece) in enumerate(pieces[number])
            if len(piece) > 1
        ]

    names = [document.document or number for number, document in enumerate(documents)]
    clusters = [names.index(name) for name in names]

    def measure(scenario: Scenario, answers: Answers) -> Measurements:
        return _measure(scenario, answers, clusters)

    resampled = "documents" if any(document.document for document in documents) else "contexts"
    return Scenario("perplexity", protocol, tuple(cases), ask, measure, 1, resampled=lambda cell: resampled)


def _measure(scenario: Scenario, answers: Answers, clusters: Sequence[int]) -> Measurements:
    """The losses of the windows of each part; under the released protocol a document counts once, with its mean."""
    found: dict[tuple[Cell, str], dict[Hashable, Sample]] = {}
    for (case, place, _), answer in sorted(answers.items()):
        if not isinstance(answer, str):
            part = scenario.cases[case].context.questions[place].text
            found.setdefault(((), NAMES[part]), {})[case, place] = Sample(clusters[case], *answer)
    return {key: _documents(samples) if scenario.protocol == "released" else samples for key, samples in found.items()}


def _documents(windows: Mapping[Hashable, Sample]) -> dict[Hashable, Sample]:
    """A sample for each document: the mean loss of its tokens."""
    sums: dict[int, tuple[float, float]] = {}
    for window in windows.values():
        total, weight = sums.get(window.cluster, (0.0, 0.0))
        sums[window.cluster] = total + window.total, weight + window.weight
    return {document: Sample(document, total / weight) for document, (total, weight) in sums.items()}
