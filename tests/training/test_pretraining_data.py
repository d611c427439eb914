"""What a pretraining run trains on and what it keeps back, on tokens that tell their own document and place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from invented import make_tokenizer, random_text

from gakernels import InputError
from gakernels.data import Corpus
from gakernels.training.pretraining_data import (
    DataConfig,
    HeldOutSize,
    PretrainingData,
    SourceConfig,
    cached_segments,
    few,
    load_data,
    split,
)

LENGTH = 6


def corpus(documents: int, tokens: int = 40) -> Corpus:
    """Token i of document d is 1000 d + i."""
    return Corpus.of([torch.arange(1000 * number, 1000 * number + tokens) for number in range(documents)])


def made(config: DataConfig, contexts: int, **corpora: Corpus) -> PretrainingData:
    return split(config, lambda source: corpora[source.path], LENGTH, HeldOutSize(contexts, LENGTH))


def trained(data: PretrainingData) -> set[int]:
    tokens = data.segments.take(range(len(data.segments)))
    assert tokens.shape[1] == LENGTH
    return set(tokens.flatten().tolist())


def scored(data: PretrainingData) -> set[int]:
    """All held-out tokens; what follows a context does so in the text."""
    contexts, after = data.held_out.contexts, data.held_out.continuations
    assert after is not None
    assert contexts.shape[1] == after.shape[1] == LENGTH
    return set(torch.cat([contexts, after]).flatten().tolist())


def test_without_more_words_the_end_is_held_out() -> None:
    whole = corpus(5, 40)
    data = made(DataConfig("a"), 4, a=whole)
    assert not trained(data) & scored(data)
    # 4 contexts with what follows them are 48 tokens; 36 of the last document and 12 of the one before are within it.
    assert scored(data) == {*range(4000, 4036), *range(3024, 3036)}
    assert data.held_out.documents == (3, 4, 4, 4)
    last = whole.ids[: 3 * 40 + 24].tolist()
    assert trained(data) == set(last[: len(last) // LENGTH * LENGTH])


def test_contexts_can_be_shorter_than_segments() -> None:
    data = split(DataConfig("a"), lambda _: corpus(4, 40), 10, HeldOutSize(3, 4))
    assert data.held_out.contexts.shape == (3, 4)
    assert (data.held_out.continuations[:, 0] - data.held_out.contexts[:, 0] == 4).all()
    assert data.segments.take(range(len(data.segments))).shape == ((4 * 40 - 24) // 10, 10)


def test_documents_can_be_held_out() -> None:
    data = made(DataConfig("a", held_out_every=3, within_documents=True), 4, a=corpus(8, 26))
    assert scored(data) == {1000 * number + place for number in (2, 5) for place in range(24)}
    assert trained(data) == {1000 * number + place for number in (0, 1, 3, 4, 6, 7) for place in range(24)}
    assert data.held_out.documents == (2, 2, 5, 5)
    assert data.held_out.others() == [2, 2, 0, 0]


def test_a_source_of_its_own_can_be_held_out() -> None:
    other = Corpus.of([torch.arange(50_000 + 100 * number, 50_000 + 100 * number + 24) for number in range(4)])
    data = made(DataConfig("a", held_out_path="b"), 4, a=corpus(3, 12), b=other)
    assert trained(data) == {1000 * number + place for number in range(3) for place in range(12)}
    assert data.held_out.contexts[:, 0].tolist() == [50_000, 50_100, 50_200, 50_300]  # spread over all of it
    assert data.held_out.documents == (0, 1, 2, 3)
    others = data.held_out.others()
    assert all(data.held_out.documents[row] != data.held_out.documents[other] for row, other in enumerate(others))


def test_documents_too_short_to_score_are_joined_and_then_unknown() -> None:
    data = made(DataConfig("a"), 3, a=corpus(20, 7))
    assert data.held_out.documents is None
    assert not trained(data) & scored(data)


def test_sources_are_mixed_by_weight_and_each_is_held_out_from() -> None:
    config = DataConfig(sources={"x": SourceConfig("a", 3.0), "y": SourceConfig("b", 1.0)})
    other = Corpus.of([torch.arange(90_000, 90_200)])
    data = made(config, 4, a=corpus(3, 200), b=other)
    assert not trained(data) & scored(data)
    assert {token >= 90_000 for token in data.held_out.contexts[:, 0].tolist()} == {True, False}
    taken = [data.segments.take([index])[0, 0] for step in range(250) for index in data.order.indices(step, 4, seed=7)]
    assert np.mean([int(token) >= 90_000 for token in taken]) == pytest.approx(0.25, abs=1e-9)


def test_few_contexts_are_spread_and_keep_what_belongs_to_them() -> None:
    data = made(DataConfig("a", held_out_every=2), 6, a=corpus(12, 40))
    some = few(data.held_out, 3)
    rows = [0, 2, 4]
    assert some.contexts.equal(data.held_out.contexts[rows])
    assert some.continuations is not None
    assert some.continuations.equal(data.held_out.continuations[rows])
    assert some.documents == tuple(data.held_out.documents[row] for row in rows)
    assert few(data.held_out, 100).contexts.equal(data.held_out.contexts)


def test_too_little_data_is_told_with_numbers() -> None:
    with pytest.raises(InputError, match=r"a gives 60 tokens, of which 60 are held out \(5 contexts of 6"):
        made(DataConfig("a"), 5, a=corpus(2, 30))
    with pytest.raises(InputError, match=r"data: one segment needs 12 tokens, but .* only 9"):
        made(DataConfig("a"), 2, a=corpus(1, 9))
    with pytest.raises(InputError, match=r"5 contexts are to be held out, each with 12 tokens, but there are 3"):
        made(DataConfig("a", held_out_path="b"), 5, a=corpus(2, 30), b=corpus(1, 36))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data must have either a path or sources"),
        ({"path": "a", "sources": {"x": SourceConfig("b")}}, "data must have either a path or sources"),
        (
            {"sources": {"x": SourceConfig("b"), "y": SourceConfig("c")}, "cache": Path("d")},
            "each has a cache of its own",
        ),
    ],
)
def test_sources_that_contradict_each_other_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataConfig(**values)


def test_text_is_read_through_a_token_cache(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(random_text(300))
    config = DataConfig(str(tmp_path / "a.txt"), cache=tmp_path / "cache")
    assert cached_segments(config, make_tokenizer(), LENGTH) is None
    data = load_data(config, make_tokenizer(), 64, LENGTH, HeldOutSize(4, LENGTH), progress=False)
    assert len(data.segments) == (302 - 8 * LENGTH) // LENGTH
    assert cached_segments(config, make_tokenizer(), LENGTH) == 302 // LENGTH
    with pytest.raises(InputError, match=r"document 1 of .*a\.txt has the token 'w\d+' \(\d+\), but .* has 5 rows"):
        load_data(config, make_tokenizer(), 5, LENGTH, HeldOutSize(4, LENGTH), progress=False)
    with pytest.raises(InputError, match="was made with another tokenizer"):
        load_data(config, make_tokenizer(bos=False), 64, LENGTH, HeldOutSize(4, LENGTH), progress=False)
