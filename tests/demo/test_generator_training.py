"""The windows that the demo's generator is trained on."""

from random import Random

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gakernels import GenerativeAdapter, GeneratorConfig
from gakernels.data.people import draw_document
from gakernels.demo.generator_training import GeneratorRecipe, document_windows, generator_losses
from gakernels.demo.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_context_copies_and_questions_are_laid_out(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random(1)
    documents = [draw_document(rng, 1, (18, 18)), draw_document(rng, 1, (3, 3))]
    batch = document_windows(documents, tokenizer, 128, rng, questions=4, questions_per_window=2)
    assert batch.chunks == 2
    assert batch.seen == (0, 1, 2, 2, 2, 2)
    for row, document in enumerate(documents):
        tokens = [batch.input_ids[row, t][batch.mask[row, t]].tolist() for t in range(6)]
        assert tokens[0] + tokens[1] == tokenizer(document.text())["input_ids"]
        assert tokens[2:4] == tokens[:2]
    assert not batch.mask[1, 1].any()  # the short document has an empty second chunk


def test_only_the_answers_count_as_answers_and_they_are_right(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random(2)
    document = draw_document(rng, 1, (6, 6))
    batch = document_windows([document], tokenizer, 128, rng, questions=6, questions_per_window=3)
    told = dict(document.questions())
    for window in range(2 * batch.chunks, batch.input_ids.shape[1]):
        ids, answers = batch.input_ids[0, window], batch.targets["answers"][0, window]
        text = tokenizer.decode(ids[batch.mask[0, window]], skip_special_tokens=True)
        asked = [sentence.strip() for sentence in text.split(".") if sentence.strip()]
        given = [told[sentence.rsplit(" ", 2)[0]] for sentence in asked]
        assert tokenizer.decode(ids[answers]) == " ".join(given)
        assert [sentence.split("Answer: ")[1] for sentence in asked] == given
    assert not batch.targets["answers"][0, : 2 * batch.chunks].any()


def test_losses_depend_on_the_step_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    settings = GeneratorConfig(state_size=8, rank=4, chunk_size=128)
    model = GenerativeAdapter(LlamaForCausalLM(config), settings, tokenizer)
    recipe = GeneratorRecipe(steps=10, documents=1)
    first, again, other = (
        {name: loss.total.item() for name, loss in generator_losses(model, recipe, step).items()} for step in (3, 3, 4)
    )
    assert first == again
    assert first != other
