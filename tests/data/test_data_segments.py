"""A corpus, its parts and the segments that are cut from it."""

import numpy as np
import pytest
import torch
from torch import Tensor
from writing import drawn

from gakernels import InputError
from gakernels.data import Corpus, document_segments, hold_out_documents, packed_segments


def texts(documents: int, longest: int = 40) -> list[Tensor]:
    """Documents, some of them empty, without a token that two have in common."""
    lengths = torch.randint(0, longest, (documents,)).tolist()
    lengths[0] += 1
    return list(torch.arange(sum(lengths)).split(lengths))


def test_a_corpus_reads_any_range_of_its_documents() -> None:
    documents = texts(20)
    corpus, joined = Corpus.of(documents), torch.cat(documents)
    assert (corpus.tokens, corpus.documents) == (len(joined), 20)
    for _ in range(20):
        start = drawn(0, len(joined))
        count = drawn(1, len(joined) - start + 1)
        assert corpus.read(start, count).tolist() == joined[start : start + count].tolist()


def test_a_part_reads_as_if_the_other_documents_were_not_there() -> None:
    documents = texts(40)
    corpus, kept = Corpus.of(documents), np.array([True, *(torch.rand(39) < 0.6).tolist()])
    for depth in range(2):
        part = corpus.select(kept)
        documents = [document for document, keep in zip(documents, kept, strict=True) if keep]
        joined = torch.cat(documents)
        assert part.tokens == len(joined)
        assert part.documents == len(documents)
        assert part.document_ids.tolist() == corpus.document_ids[kept].tolist()
        for _ in range(20):
            start = drawn(0, len(joined))
            count = drawn(1, len(joined) - start + 1)
            assert part.read(start, count).tolist() == joined[start : start + count].tolist()
        if depth == 0:  # a part of the part
            corpus, kept = part, np.arange(len(documents)) % 3 != 1


def test_the_fingerprint_is_of_tokens_borders_and_part() -> None:
    documents = texts(10)
    corpus = Corpus.of(documents)
    assert Corpus.of(documents).fingerprint == corpus.fingerprint
    assert Corpus.of([torch.cat(documents)]).fingerprint != corpus.fingerprint
    assert Corpus.of([document + 1 for document in documents]).fingerprint != corpus.fingerprint
    kept = np.arange(10) != drawn(0, 10)
    assert corpus.select(kept).fingerprint == corpus.select(kept).fingerprint != corpus.fingerprint


def test_every_kth_document_is_held_out() -> None:
    corpus, every = Corpus.of(texts(30)), drawn(2, 9)
    training, held_out = hold_out_documents(corpus, every)
    assert held_out.document_ids.tolist() == list(range(every - 1, 30, every))
    assert sorted([*training.document_ids, *held_out.document_ids]) == list(range(30))
    assert training.tokens + held_out.tokens == corpus.tokens
    trained, held = (set(part.read(0, part.tokens).tolist()) for part in (training, held_out))
    assert not trained & held
    if held_out.tokens >= 2:
        segments = packed_segments(training, 2)
        assert not set(segments.take(range(len(segments))).flatten().tolist()) & held


@pytest.mark.parametrize(
    ("every", "message"),
    [(1, "every 2nd or fewer, but every is 1"), (11, "every 11th document is to be held out, but there are only 10")],
)
def test_documents_that_can_not_be_held_out_are_told(every: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hold_out_documents(Corpus.of(texts(10)), every)


def test_packed_segments_are_cut_through_all_documents_and_the_rest_is_left_out() -> None:
    documents, length = texts(20), drawn(1, 50)
    joined = torch.cat(documents)
    segments = packed_segments(Corpus.of(documents), length)
    assert len(segments) == len(joined) // length
    assert segments.dropped == len(joined) % length
    taken = segments.take(range(len(segments)))
    assert taken.dtype == torch.int64
    assert taken.equal(joined[: len(segments) * length].view(-1, length))
    picked = torch.randint(len(segments), (5,)).tolist()
    assert segments.take(picked).equal(taken[picked])
    owners = {int(token): number for number, document in enumerate(documents) for token in document}
    assert segments.document_ids.tolist() == [owners[int(row[0])] for row in taken]


def test_document_segments_never_cross_a_document() -> None:
    documents, length = texts(30), drawn(1, 12)
    segments = document_segments(Corpus.of(documents), length)
    expected = [
        (number, document[start : start + length].tolist())
        for number, document in enumerate(documents)
        for start in range(0, len(document) - length + 1, length)
    ]
    assert segments.take(range(len(segments))).tolist() == [tokens for _, tokens in expected]
    assert segments.document_ids.tolist() == [number for number, _ in expected]
    assert segments.dropped == sum(len(document) % length for document in documents)


def test_no_segments_can_be_taken() -> None:
    assert packed_segments(Corpus.of(texts(9)), 1).take([]).shape == (0, 1)


def test_some_segments_are_selected() -> None:
    segments = packed_segments(Corpus.of(texts(20)), drawn(1, 5))
    kept = np.array([True, False, *(torch.rand(len(segments) - 2) < 0.5).tolist()])
    part = segments.select(kept)
    assert part.take(range(len(part))).equal(segments.take(np.flatnonzero(kept).tolist()))
    assert part.document_ids.tolist() == segments.document_ids[kept].tolist()
    assert part.dropped == segments.dropped + (len(segments) - len(part)) * segments.length
    assert part.fingerprint != segments.fingerprint


def test_too_few_tokens_for_a_segment_are_told() -> None:
    length = drawn(3, 20)
    documents = [torch.arange(length - 1), torch.arange(drawn(0, length - 1))]
    total = sum(map(len, documents))
    if total < length:
        with pytest.raises(InputError, match=f"one segment needs {length} tokens, but there are only {total}"):
            packed_segments(Corpus.of(documents), length)
    with pytest.raises(
        InputError, match=f"one segment needs {length} tokens, but the longest of 2 documents has only {length - 1}"
    ):
        document_segments(Corpus.of(documents), length)


def test_a_segment_without_tokens_is_refused() -> None:
    for cut in (packed_segments, document_segments):
        with pytest.raises(InputError, match="the length of a segment must be at least 1, but it is 0"):
            cut(Corpus.of(texts(3)), 0)
