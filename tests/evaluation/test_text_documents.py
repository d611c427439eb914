"""Documents of text and JSON lines, cut into context and what follows."""

import gzip
import json
import lzma
from pathlib import Path

import pytest
from invented import make_tokenizer, random_text

from gakernels import InputError
from gakernels.evaluation.perplexity import cut_documents

TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_plain_text_is_cut_into_pieces(tmp_path: Path) -> None:
    path, text = tmp_path / "a.txt", random_text(107)
    path.write_text(text)
    documents, skipped = cut_documents(path, TOKENIZER, 10)
    assert len(documents) == 5
    assert [token for d in documents for token in (*d.context, *d.following)] == ids(text)[:100]
    for document in documents:
        assert ids(document.text) == list(document.context)
        assert document.text in text
    assert len({document.name for document in documents}) == 5
    assert skipped.total == 0
    drawn = {seed: cut_documents(path, TOKENIZER, 10, limit=2, seed=seed)[0] for seed in range(20)}
    for some in drawn.values():
        assert some == [document for document in documents if document in some]  # in their order
        assert len(some) == 2
    assert {document.name for some in drawn.values() for document in some} == {document.name for document in documents}


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_lines_are_documents(tmp_path: Path, suffix: str) -> None:
    texts = [random_text(30), random_text(9), random_text(55)]
    lines = [json.dumps({"text": text, "title": "t"}) for text in texts]
    lines[1:1] = ["no json", json.dumps({"txt": "w3"}), json.dumps(["w3"]), ""]
    path = tmp_path / f"a.jsonl{suffix}"
    opener = {"": open, ".gz": gzip.open, ".xz": lzma.open}[suffix]
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    documents, skipped = cut_documents(path, TOKENIZER, 10)
    assert [list(d.context + d.following) for d in documents] == [ids(texts[0])[:20], ids(texts[2])[:20]]
    assert [d.name for d in documents] == [f"{path.name}:1", f"{path.name}:7"]
    assert skipped.counts == {"line without a text": 3, "document of fewer than 20 tokens": 1}


def test_a_draw_of_documents_depends_on_the_seed_and_not_on_their_order(tmp_path: Path) -> None:
    texts = [f"{random_text(9)} {number} {random_text(25)}" for number in range(40)]
    paths = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, written in zip(paths, (texts, texts[::-1]), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in written))
    some, turned = (
        [document.text for document in cut_documents(path, TOKENIZER, 10, limit=7, seed=3)[0]] for path in paths
    )
    assert some == turned[::-1]
    more = [document.text for document in cut_documents(paths[0], TOKENIZER, 10, limit=12, seed=3)[0]]
    assert set(some) < set(more)
    assert cut_documents(paths[0], TOKENIZER, 10, limit=7, seed=4)[0] != some
    chosen = [len(cut_documents(paths[0], TOKENIZER, 10, limit=limit)[0]) for limit in (1, 40, 99)]
    assert chosen == [1, 40, 40]


def test_several_pieces_of_a_document(tmp_path: Path) -> None:
    texts = [random_text(107), random_text(30), random_text(9)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    everything, skipped = cut_documents(path, TOKENIZER, 10, pieces=9)
    assert [token for piece in everything[:5] for token in piece.context + piece.following] == ids(texts[0])[:100]
    assert [piece.document for piece in everything] == [f"{path.name}:1"] * 5 + [f"{path.name}:2"]
    assert skipped.counts == {"document of fewer than 20 tokens": 1}
    starts = set()
    for seed in range(20):
        drawn = cut_documents(path, TOKENIZER, 10, seed=seed, pieces=2)[0]
        assert drawn == [piece for piece in everything if piece in drawn]  # in their order
        assert [piece.document for piece in drawn] == [f"{path.name}:1"] * 2 + [f"{path.name}:2"]
        assert len(cut_documents(path, TOKENIZER, 10, 2, seed, 2)[0]) == 2
        starts |= {piece.name for piece in drawn}
    assert starts == {piece.name for piece in everything}


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        cut_documents(tmp_path / "none.txt", TOKENIZER, 4)
    with pytest.raises(InputError, match="tokens must be at least 2"):
        cut_documents(tmp_path / "none.txt", TOKENIZER, 1)
    with pytest.raises(InputError, match="limit must be at least 1"):
        cut_documents(tmp_path / "none.txt", TOKENIZER, 4, limit=0)
    with pytest.raises(InputError, match="pieces must be at least 1, but it is 0"):
        cut_documents(tmp_path / "none.jsonl", TOKENIZER, 4, pieces=0)
    with pytest.raises(InputError, match="pieces must be 1 for plain text"):
        cut_documents(tmp_path / "none.txt", TOKENIZER, 4, pieces=2)
    short = tmp_path / "short.txt"
    short.write_text("w3 w4")
    with pytest.raises(InputError, match="has no document of 8 tokens: 1 x document of fewer than 8 tokens"):
        cut_documents(short, TOKENIZER, 4)
    for name, content in (("a.txt", b"\xff\xfe\xfa"), ("a.gz", b"no gzip"), ("a.xz", b"no xz")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="can't be read"):
            cut_documents(tmp_path / name, TOKENIZER, 4)
