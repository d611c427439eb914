"""Batches of rows give what each row gives alone, in a plain model with its adapter merged."""

from random import Random

import pytest
import torch
from invented import make_tokenizer
from tiny import FAMILIES, make_model, plain_copy, random_context
from transformers import PreTrainedModel

from gakernels import Adapter, GenerativeAdapter, InputError
from gakernels.generation import decoder as decoding
from gakernels.generation.decoder import Decoder, Row, plan_batches


def make(family: str = "llama") -> GenerativeAdapter:
    dtype = torch.float32 if family == "gemma2" else torch.float64  # eager attention of float64 overflows its mask
    return make_model(family, dtype, dtype, make_tokenizer(), linears=FAMILIES[family][2])


def merged(model: GenerativeAdapter, adapter: Adapter | None) -> PreTrainedModel:
    base = plain_copy(model)
    if adapter is not None:
        for name in model.adapted_names:
            base.get_submodule(name).weight += adapter.delta(name)
    return base


def rows_with_adapters(model: GenerativeAdapter, count: int) -> list[Row]:
    adapters: list[Adapter | None] = [None, *model.adapt([random_context(9), random_context(15)])]
    return [Row(tuple(random_context(3 + 2 * number)), adapters[number % 3]) for number in range(count)]


def greedy(base: PreTrainedModel, tokens: tuple[int, ...], count: int, ends: tuple[int, ...]) -> list[int]:
    """Reads everything again for every token."""
    new: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            token = int(base(input_ids=torch.tensor([[*tokens, *new]]), use_cache=False).logits[0, -1].argmax())
            if token in ends:
                break
            new.append(token)
    return new


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_answers_of_a_batch_are_those_of_each_row_alone(family: str) -> None:
    model = make(family)
    decoder, rows = Decoder(model), rows_with_adapters(model, 6)
    expected = [
        decoder.tokenizer.decode(
            greedy(merged(model, row.adapter), row.tokens, 7, model.end_tokens()), skip_special_tokens=True
        )
        for row in rows
    ]
    assert decoder.generate(rows, 7, ()) == [text.strip() for text in expected]


def test_an_answer_ends_in_front_of_a_stop() -> None:
    model = make()
    decoder, rows = Decoder(model), rows_with_adapters(model, 4)
    whole = decoder.generate(rows, 8, ())
    words = sorted({word for text in whole for word in text.split()})
    stop = Random(torch.initial_seed()).choice(words)
    cut = decoder.generate(rows, 8, (stop,))
    assert cut == [text.split(stop)[0].strip() for text in whole]


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_losses_of_a_batch_are_those_of_each_row_alone(family: str) -> None:
    model = make(family)
    decoder = Decoder(model)
    rows = [Row(row.tokens, row.adapter, 1 + number % 3) for number, row in enumerate(rows_with_adapters(model, 6))]
    for row, (total, tokens) in zip(rows, decoder.losses(rows), strict=True):
        labels = torch.tensor([[-100] * row.start + list(row.tokens[row.start :])])
        with torch.no_grad():
            plain = merged(model, row.adapter)(input_ids=torch.tensor([row.tokens]), labels=labels, use_cache=False)
        assert tokens == len(row.tokens) - row.start
        # The loss of both is taken in float32.
        assert total == pytest.approx(float(plain.loss) * tokens, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "gpt_neox"])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_start_that_is_read_once_changes_nothing(family: str, adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LEAST_SHARED", 5)
    model = make(family)
    decoder = Decoder(model)
    adapter = model.adapt([random_context(9)])[0] if adapted else None
    start, ends = random_context(11), [[4, *random_context(number)] for number in (6, 1, 3, 8)]
    ends[2][0] = 5
    rows = [Row((*start, *end), adapter, 11 + len(end)) for end in ends]
    shared = decoder.shared_start(rows)
    assert shared is not None
    assert shared.tokens == 11
    assert decoder.generate(rows, 6, (), shared) == decoder.generate(rows, 6, ())
    assert decoder.generate(rows[1:2], 6, (), shared) == decoder.generate(rows[1:2], 6, ())  # and is not used up
    scored = [Row(row.tokens, adapter, 12 + number % 2) for number, row in enumerate(rows)]
    for one, other in zip(decoder.losses(scored, shared), decoder.losses(scored), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_a_start_is_shared_only_where_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    decoder, start = Decoder(model), random_context(20)
    rows = [Row((*start, 3, 4), None, 22), Row((*start, 4), None, 21)]
    assert decoder.shared_start(rows) is None  # too little
    monkeypatch.setattr(decoding, "LEAST_SHARED", 5)
    found = decoder.shared_start(rows)
    assert found is not None
    assert found.tokens == 20
    # The last token in front of what is scored must be read with each row.
    scored = decoder.shared_start([Row(rows[0].tokens, None, 20), Row(rows[1].tokens, None, 15)])
    assert scored is not None
    assert scored.tokens == 14
    assert decoder.shared_start(rows[:1]) is None
    adapters = model.adapt([random_context(9), random_context(9)])
    differing = [Row(row.tokens, adapter, row.start) for row, adapter in zip(rows, adapters, strict=True)]
    assert decoder.shared_start(differing) is None
    assert Decoder(make("mistral")).shared_start(rows) is None  # a sliding window


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="tokenizer is needed to ask questions"):
        Decoder(make_model())


def test_plans_hold_every_row_once_within_the_bounds() -> None:
    random = Random(torch.initial_seed())
    for _ in range(50):
        lengths = [random.randint(1, 400) for _ in range(random.randint(1, 60))]
        bound, most = random.randint(1, 2000), random.randint(1, 9)
        batches = plan_batches(lengths, bound, most)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) <= most
            longest = max(lengths[row] for row in batch)
            assert len(batch) == 1 or len(batch) * longest <= bound
            assert all(longest - lengths[row] <= max(longest / 4, 32) for row in batch)
        ordered = [lengths[row] for batch in batches for row in batch]
        assert ordered == sorted(lengths, reverse=True)
