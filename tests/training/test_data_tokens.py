"""Documents to one sequence of tokens."""

import json
from pathlib import Path

import pytest
import torch
from invented import make_tokenizer, random_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from gakernels.training import data
from gakernels.training.data import tokenize_files


def token_ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_each_document_stands_between_the_special_tokens_there_are(tmp_path: Path, bos: bool, eos: bool) -> None:
    texts = [random_text(int(torch.randint(1, 30, ()))) for _ in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:3]))
    (tmp_path / "b.txt").write_text(texts[3])
    tokens = tokenize_files([tmp_path / "a.jsonl", tmp_path / "b.txt"], make_tokenizer(bos, eos), progress=False)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [token for text in texts for token in [1] * bos + token_ids(text) + [2] * eos]


def test_a_long_document_is_cut_at_line_ends_without_a_trace(tmp_path: Path) -> None:
    text = random_text(60_000, per_line=int(torch.randint(5, 2000, ())))
    assert len(list(data._pieces(text))) > 1
    (tmp_path / "a.txt").write_text(text)
    tokens = tokenize_files([tmp_path / "a.txt"], make_tokenizer(), progress=False)
    assert tokens.tolist() == [1, *token_ids(text), 2]


def test_a_tokenizer_of_bytes_gives_the_long_document_back(tmp_path: Path) -> None:
    text = random_text(30_000) + "Ein Satz über Größe.\n" * 3
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    (tmp_path / "a.txt").write_text(text)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokens = tokenize_files([tmp_path / "a.txt"], fast, progress=False)
    assert fast.decode(tokens) == text
    whole = len(fast(text)["input_ids"])
    assert whole <= len(tokens) <= whole + len(list(data._pieces(text)))


def test_pieces_make_up_the_document() -> None:
    text = random_text(500)
    pieces = list(data._pieces(text, size=int(torch.randint(1, 300, ()))))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert all(piece.endswith("\n") for piece in pieces)


def test_a_document_without_line_ends_is_one_piece() -> None:
    text = random_text(500).replace("\n", " ")
    assert list(data._pieces(text, size=100)) == [text]


def test_no_warning_about_the_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text(random_text(300))
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        make_tokenizer(longest=16)(random_text(300))
        assert "longer than" in caplog.text  # it would be there
        caplog.clear()
        tokenize_files([tmp_path / "a.txt"], make_tokenizer(longest=16), progress=False)
    finally:
        logging.set_verbosity(before)
    assert caplog.text == ""
