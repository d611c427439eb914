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
    assert cut_documents(path, TOKENIZER, 10, limit=2)[0] == documents[:2]


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


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        cut_documents(tmp_path / "none.txt", TOKENIZER, 4)
    with pytest.raises(InputError, match="tokens must be at least 2"):
        cut_documents(tmp_path / "none.txt", TOKENIZER, 1)
    short = tmp_path / "short.txt"
    short.write_text("w3 w4")
    with pytest.raises(InputError, match="has no document of 8 tokens: 1 x document of fewer than 8 tokens"):
        cut_documents(short, TOKENIZER, 4)
    for name, content in (("a.txt", b"\xff\xfe\xfa"), ("a.gz", b"no gzip"), ("a.xz", b"no xz")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="can't be read"):
            cut_documents(tmp_path / name, TOKENIZER, 4)
