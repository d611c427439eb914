"""Passages ranked by an embedding model: against mean pooling written out with transformers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from invented import make_tokenizer
from tiny import VOCABULARY
from transformers import BertConfig, BertModel
from worlds import answer_of, make, run, scenario

from gakernels import InputError
from gakernels.evaluation.methods import MethodSettings
from gakernels.evaluation.retrieval import EmbeddingRetrieval, passages

pytest.importorskip("sentence_transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random embedding model, as transformers stores it: its passages have their mean state as vectors."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    BertModel(config).eval().save_pretrained(tmp_path / "embedder")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "</s>"})
    tokenizer.save_pretrained(tmp_path / "embedder")
    return tmp_path / "embedder"


def vector(folder: Path, words: str) -> torch.Tensor:
    ids = torch.tensor([make_tokenizer()(words)["input_ids"]])
    with torch.no_grad():
        return BertModel.from_pretrained(folder).eval()(input_ids=ids).last_hidden_state[0].mean(0)


def best(folder: Path, context: str, query: str) -> str:
    pieces, asked = passages(context, 4), vector(folder, query)
    return max(pieces, key=lambda piece: float(F.cosine_similarity(vector(folder, piece), asked, dim=0)))


def test_the_most_similar_passage_is_put_before_the_question(folder: Path) -> None:
    model, asked = make(), scenario(3)
    runner = run(model, asked, "retrieval_embedding", embedding_model=str(folder), passage_words=4)
    answers = runner.log.answers("retrieval_embedding")
    for number, case in enumerate(asked.cases):
        for place, question in enumerate(case.context.questions):
            prompt = f"{best(folder, case.context.text, question.text)}\n\n{question.text}"
            assert answers[number, place, -1] == answer_of(model.base, model, prompt)
    (cost,) = runner.measured_costs()
    kept = [len(case.context.text) + 16 * 4 * len(passages(case.context.text, 4)) for case in asked.cases]
    assert cost.stored_bytes == sum(kept) / 3


def test_passages_are_found_that_share_no_word(folder: Path) -> None:
    """Which BM25 can't: all its scores are 0."""
    method = EmbeddingRetrieval(make(), scenario(1), MethodSettings(embedding_model=str(folder), passage_words=4))
    case = scenario(1).cases[0]
    found = method.prepare([case]).in_front(0, "w63")
    assert found == best(folder, case.context.text, "w63")


def test_the_model_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs an embedding model; name one with --embedding-model"):
        run(make(), scenario(1), "retrieval_embedding")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"--embedding-model: '.*' can't be loaded"):
        run(make(), scenario(1), "retrieval_embedding", embedding_model=str(tmp_path / "empty"))
