"""The loss of a document equals transformers' own."""

import pytest
import torch
from invented import make_tokenizer, random_text
from tiny import make_model, plain_copy

from gakernels import GenerativeAdapter, InputError
from gakernels.demo.experiment import document_loss
from gakernels.model.windows import split_evenly


def make() -> GenerativeAdapter:
    return make_model(tokenizer=make_tokenizer(), chunk_size=12)


def loss_of(model: GenerativeAdapter, ids: list[int], delta: bool, text: str) -> float:
    """Summed loss of one window of token ids."""
    base, tokens = plain_copy(model), torch.tensor([ids])
    if delta:
        adapter = model.stream().append(text).adapter()
        for name in adapter.lora_a:
            base.get_submodule(name).weight += adapter.delta(name)
    with torch.no_grad():
        return float(base(input_ids=tokens, labels=tokens).loss) * (len(ids) - 1)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("words", [7, 40])
def test_it_equals_transformers_window_by_window(words: int, adapted: bool) -> None:
    model, text = make(), random_text(words)
    ids = model.tokenizer(text)["input_ids"]
    windows = split_evenly(ids, 12)
    assert len(windows) == (1 if words == 7 else 4)
    adapter = model.stream().append(text).adapter() if adapted else None
    loss, tokens = document_loss(model, text, adapter)
    assert tokens == len(ids) - len(windows)
    assert loss == pytest.approx(sum(loss_of(model, window, adapted, text) for window in windows), rel=1e-5)


def test_an_adapter_of_another_text_gives_another_loss() -> None:
    model, text = make(), random_text(20)
    own, other = (model.stream().append(context).adapter() for context in (text, random_text(20)))
    assert document_loss(model, text, own)[0] != pytest.approx(document_loss(model, text, other)[0], rel=1e-5)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="empty"):
        document_loss(make(), text, None)
