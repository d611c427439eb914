"""Documents to tokens."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from invented import make_tokenizer, random_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging
from writing import drawn

from gakernels.data.documents import Document, pieces_of
from gakernels.data.tokenizing import token_blocks, tokenizer_description


def token_ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def documents(texts: list[str]) -> Iterator[Document]:
    return map(pieces_of, texts)


def tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """All ids, and where the documents begin."""
    ids: list[int] = []
    starts: list[int] = []
    for block in token_blocks(documents(texts), tokenizer):
        starts += [len(ids) + int(start) for start in block.starts]
        ids += block.ids.tolist()
    return ids, starts


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_each_document_stands_between_the_special_tokens_there_are(bos: bool, eos: bool) -> None:
    texts = [random_text(drawn(1, 30)) for _ in range(4)]
    ids, starts = tokens_of(texts, make_tokenizer(bos, eos))
    rows = [[1] * bos + token_ids(text) + [2] * eos for text in texts]
    assert ids == [token for row in rows for token in row]
    assert starts == [sum(map(len, rows[:number])) for number in range(4)]


def test_more_documents_than_a_batch_takes_and_one_of_many_pieces() -> None:
    texts = [random_text(drawn(1, 4)) for _ in range(1500)]
    texts.insert(drawn(0, 1500), random_text(400_000, per_line=drawn(5, 2000)))
    blocks = list(token_blocks(documents(texts), make_tokenizer()))
    assert len(blocks) > 1
    ids, starts = tokens_of(texts, make_tokenizer())
    assert ids == [token for text in texts for token in [1, *token_ids(text), 2]]
    assert [ids[start] for start in starts] == [1] * 1501
    assert ids.count(1) == 1501


def test_a_tokenizer_of_bytes_gives_the_long_document_back() -> None:
    text = random_text(30_000) + "Ein Satz über Größe.\n" * 3
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids, starts = tokens_of([text], fast)
    assert starts == [0]
    assert fast.decode(ids) == text
    whole = len(fast(text)["input_ids"])
    assert whole <= len(ids) <= whole + len(list(pieces_of(text)))


def test_a_document_of_which_no_token_is_left() -> None:
    tokenizer = make_tokenizer(bos=False, eos=False)
    ids, starts = tokens_of(["w3 w4", " ", "w5"], tokenizer)
    assert (ids, starts) == ([3, 4, 5], [0, 2, 2])


def test_no_warning_about_the_length(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        make_tokenizer(longest=16)(random_text(300))
        assert "longer than" in caplog.text  # it would be there
        caplog.clear()
        tokens_of([random_text(300)], make_tokenizer(longest=16))
    finally:
        logging.set_verbosity(before)
    assert caplog.text == ""


def test_a_tokenizer_is_known_again_by_what_decides_about_tokens(tmp_path: Path) -> None:
    described = tokenizer_description(make_tokenizer())
    assert tokenizer_description(make_tokenizer()) == described
    assert json.loads(json.dumps(described)) == described
    assert described["vocabulary"] == len(make_tokenizer())
    used = make_tokenizer()
    used(["w3", "w4 w5"], padding=False, truncation=True, max_length=1)  # leaves its settings in the tokenizer
    assert tokenizer_description(used) == described
    used.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer_description(loaded)["fingerprint"] == described["fingerprint"]


def test_other_rules_or_special_tokens_make_another_tokenizer() -> None:
    other = make_tokenizer()
    other.add_tokens(["w3 w4"])
    cased = make_tokenizer()
    cased.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizers = [make_tokenizer(), make_tokenizer(bos=False), make_tokenizer(eos=False), other, cased]
    assert len({tokenizer_description(tokenizer)["fingerprint"] for tokenizer in tokenizers}) == 5


def test_a_tokenizer_without_a_backend_is_known_by_its_vocabulary() -> None:
    class Letters:
        name_or_path = "letters"
        bos_token_id = eos_token_id = None

        def __init__(self, letters: str) -> None:
            self._letters = letters

        def get_vocab(self) -> dict[str, int]:
            return {letter: number for number, letter in enumerate(self._letters)}

        def __len__(self) -> int:
            return len(self._letters)

    letters = "".join(chr(97 + number) for number in torch.randperm(26).tolist())
    one, same, other = (tokenizer_description(Letters(text)) for text in (letters, letters, letters[::-1]))  # type: ignore[arg-type]
    assert one == same
    assert one["fingerprint"] != other["fingerprint"]
