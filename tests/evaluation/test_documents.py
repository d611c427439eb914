"""What documents cost, and the adapters of sets of them: against plain models and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import plain_copy
from transformers import DynamicCache
from worlds import answer_of, contexts, make, merged, text

from gakernels import Adapter, GenerativeAdapter, InputError
from gakernels.evaluation.datasets import EvaluationContext, Question
from gakernels.evaluation.document_reading import PAGE_BYTES, PAGES, measure_reading
from gakernels.evaluation.document_sets import COMBINED, OWN, SetScores, added_updates, measure_sets
from gakernels.evaluation.metrics import answer_f1
from gakernels.evaluation.prompts import qa_prompt
from gakernels.model.stream import ContextStream

# Reading


def test_a_document_is_read_once_up_to_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = make(), [text(40) for _ in range(3)]
    read: list[int] = []
    original = ContextStream.append

    def append(self: ContextStream, context: object, *rest: int) -> ContextStream:
        read.append(self.tokens_seen)
        return original(self, context, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ContextStream, "append", append)
    costs, _ = measure_reading(model, told, [900, 300], progress=False)
    document = "".join(f"{one}\n\n" for one in told * 99)
    assert [cost.bytes for cost in costs] == [300, 900]
    for cost in costs:
        # A word that is cut in two becomes two tokens, which the next size reads.
        assert abs(cost.tokens - len(model.tokenizer(document[: cost.bytes])["input_ids"])) <= 1
        assert abs(cost.page_tokens - len(document[:PAGE_BYTES].split())) < 60
    assert costs[0].read_seconds < costs[1].read_seconds
    assert min(cost.page_seconds for cost in costs) > 0
    assert costs[0].peak_bytes <= costs[1].peak_bytes
    passes = 8 * model.config.chunk_size
    assert read[:1] == [0]  # the first pass, which does not count
    assert read[1:].count(0) == 1
    assert read.count(costs[0].tokens) == PAGES + 1  # its pages, and the rest of the document
    assert [seen for seen in read[1:] if seen < costs[0].tokens] == list(range(0, costs[0].tokens, passes))


def test_what_is_kept_is_what_the_parts_take() -> None:
    model = make()
    (cost,), kept = measure_reading(model, [text(30)], [200], progress=False)
    stream = model.stream().append(text(9))
    assert kept.adapter == stream.adapter().to("cpu", model.base.dtype).bytes()
    compact = stream.compact()
    assert kept.compact == sum(part.numel() for part in (*compact.left.values(), *compact.right.values())) * 8
    assert kept.state == sum(state.nbytes for state in stream.states().values())
    cache = DynamicCache()
    plain_copy(model)(input_ids=torch.tensor([[3] * 5]), past_key_values=cache, use_cache=True)
    five = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.cache_bytes == five * cost.tokens // 5


def test_sizes_must_be_positive() -> None:
    with pytest.raises(InputError, match="sizes must be at least 1 byte, but they are 0, 5"):
        measure_reading(make(), ["w3"], [0, 5], progress=False)


# Sets


def documents(count: int) -> list[EvaluationContext]:
    return [
        EvaluationContext(context.text, tuple(Question(q.text, (text(2).strip(),)) for q in context.questions))
        for context in contexts(count, questions=2)
    ]


def found(scores: SetScores, way: str, count: int, metric: str) -> float:
    (one,) = (s for s in scores.scores if (s.way, s.documents, s.metric) == (way, count, metric))
    return one.score.value


def expected_adapter(
    model: GenerativeAdapter, way: str, texts: list[str], number: int, count: int
) -> Adapter | torch.nn.Module | None:
    """A plain model that has learned what an adapter of the way holds."""
    start = number // count * count
    group = texts[start : start + count]
    if way in ("closed_book", "prompt"):
        return plain_copy(model)
    if way == "updates_added":
        base = plain_copy(model)
        for one in group:
            adapter = model.adapt(one)
            for name in model.adapted_names:
                base.get_submodule(name).weight += adapter.delta(name)
        return base
    if way == "states_added":
        states = [model.stream().append(one).states() for one in group]
        total = {name: sum(state[name] for state in states) for name in model.adapted_names}
        return merged(model, model.adapters(total, [0])[0])
    if way == "one_stream":
        stream = model.stream()
        for one in group:
            stream.append(one)
        return merged(model, stream.adapter())
    other = texts[(number + len(texts) // 2) % len(texts)]
    return merged(model, model.adapt(texts[number] if way == OWN else other))


def test_every_way_is_that_of_a_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gakernels.evaluation.document_sets.Random.sample", lambda self, given, count: given[:count])
    model, told = make(), documents(5)
    scores = measure_sets(model, told, [2, 4], new_tokens=3, progress=False)
    kept = told[:4]  # as many as fill sets of four
    assert (scores.documents, scores.questions) == (4, 8)
    texts = [one.text for one in kept]
    ways = [("closed_book", 1), ("prompt", 1), (OWN, 1), ("other_adapter", 1)]
    for way, count in [*ways, *((way, count) for count in (2, 4) for way in COMBINED)]:
        f1, losses, tokens = [], 0.0, 0
        for number, document in enumerate(kept):
            base = expected_adapter(model, way, texts, number, count)
            for question in document.questions:
                prompt = qa_prompt(question.text, document.text if way == "prompt" else None)
                f1.append(answer_f1(answer_of(base, model, prompt, 3), question.answers))
                asked, gold = (model.tokenizer(part)["input_ids"] for part in (prompt, question.answers[0]))
                with torch.no_grad():
                    logits = base(input_ids=torch.tensor([asked + gold[1:]]), use_cache=False).logits[0]
                loss = F.cross_entropy(logits[len(asked) - 1 : -1], torch.tensor(gold[1:]), reduction="sum")
                losses, tokens = losses + float(loss), tokens + len(gold) - 1
        assert found(scores, way, count, "f1") == pytest.approx(sum(f1) / len(f1), abs=1e-12), (way, count)
        perplexity = found(scores, way, count, "answer_perplexity")
        assert perplexity == pytest.approx(math.exp(losses / tokens), rel=1e-6), (way, count)


def test_sets_are_compared_with_each_documents_own_adapter() -> None:
    model = make()
    scores = measure_sets(model, documents(4), [2], new_tokens=2, progress=False)
    for one in scores.scores:
        assert (one.against_own is None) == (one.way == OWN)
        if one.against_own is not None and one.metric == "f1":
            difference = one.score.value - found(scores, OWN, 1, "f1")
            assert one.against_own.value == pytest.approx(difference, abs=1e-12)
        assert one.score.clusters == 4 // one.documents
    assert {way: list(seconds) for way, seconds in scores.seconds.items()} == {way: [2] for way in COMBINED}


def test_added_updates_are_the_sum_of_the_weights_updates() -> None:
    model = make()
    adapters = [model.adapt(text(words)) for words in (5, 9, 14)]
    total = added_updates(adapters)
    assert total.rank == 3 * adapters[0].rank
    for name in model.adapted_names:
        assert torch.allclose(total.delta(name), sum(adapter.delta(name) for adapter in adapters), atol=1e-10)


def test_counts_must_fit_the_documents() -> None:
    for counts, shown in (([1], "1"), ([2, 9], "2, 9"), ([], "none")):
        with pytest.raises(InputError, match=f"counts must be between 2 and the 4 documents, but they are {shown}"):
            measure_sets(make(), documents(4), counts, progress=False)


CHAT = (
    "<s>{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}</s>"
    "{% else %} w5 {{ message.content }} w6{% endif %}{% endfor %}"
)


def test_a_tuned_generator_is_asked_in_its_template() -> None:
    """Adapted models only; and of the answer its own tokens are scored, not the end of the turn."""
    model, told = make(), documents(2)
    model.use_chat_template(CHAT)
    scores = measure_sets(model, told, [2], new_tokens=3, progress=False)
    losses, tokens, f1 = 0.0, 0, []
    for document in told:
        base = merged(model, model.adapt(document.text))
        for question in document.questions:
            prompt, gold = f"w5 {question.text} w6", model.tokenizer(question.answers[0])["input_ids"][1:]
            f1.append(answer_f1(answer_of(base, model, prompt, 3), question.answers))
            asked = model.tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                logits = base(input_ids=torch.tensor([asked + gold]), use_cache=False).logits[0]
            losses += float(F.cross_entropy(logits[len(asked) - 1 : -1], torch.tensor(gold))) * len(gold)
            tokens += len(gold)
    assert found(scores, OWN, 1, "f1") == pytest.approx(sum(f1) / len(f1), abs=1e-12)
    assert found(scores, OWN, 1, "answer_perplexity") == pytest.approx(math.exp(losses / tokens), rel=1e-6)
    closed = measure_sets(make_without_template(model), told, [2], new_tokens=3, progress=False)
    for metric in ("f1", "answer_perplexity"):
        assert found(scores, "closed_book", 1, metric) == found(closed, "closed_book", 1, metric)


def make_without_template(model: GenerativeAdapter) -> GenerativeAdapter:
    model.chat_template = None
    return model
