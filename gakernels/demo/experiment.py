"""The demo's experiment: a frozen model's knowledge of new documents: closed-book, from its prompt, from an adapter."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from gakernels.adapters.adapter import Adapter
from gakernels.data.people import Document, any_person_level, draw_document
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_context, encode_text
from gakernels.model.window_losses import token_losses
from gakernels.model.windows import pad_windows, split_evenly
from gakernels.training.run_log import peak_bytes

WAYS = ("closed_book", "prompt", "adapter", "other_adapter")
BATCH_SIZE = 64  # prompts answered together
NEW_TOKENS = 4  # of the longest answer
FACTS_PER_PERSON = {1: (15, 18), 2: (8, 8), 4: (4, 4), 8: (2, 2)}


@dataclass
class SizeResult:
    """Accuracies on documents about a number of people.

    Attributes:
        questions: number of questions asked in each way.
        accuracy: by way.
        any_person_level: accuracy of a reader that knows the values but not whose they are.
        seconds: by way, for all questions; `contextualise` is the time for making the adapters.
        examples: one document, and for each of its questions the expected and the given answers.
    """

    questions: int
    accuracy: dict[str, float]
    any_person_level: float
    seconds: dict[str, float]
    documents: list[Document]
    examples: list[dict[str, str]]


@dataclass
class DemoResult:
    """Everything that the demo shows."""

    by_people: dict[int, SizeResult] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    context_bytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_rss_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `gakernels demo --json` writes."""
        sizes = {
            str(people): {
                **{way: {"accuracy": size.accuracy[way], "questions": size.questions} for way in WAYS},
                "any_person_level": size.any_person_level,
                "seconds": size.seconds,
            }
            for people, size in self.by_people.items()
        }
        rest = {name: value for name, value in vars(self).items() if name != "by_people"}
        return {"by_people": sizes, **rest}


def run(model: GenerativeAdapter, seed: int, questions: int = 200, sizes: Sequence[int] = (1, 2, 4, 8)) -> DemoResult:
    """Draw new people from the held-out names, and ask at least `questions` questions about each number of people."""
    started, rng, result = time.perf_counter(), Random(seed), DemoResult()
    for people in sizes:
        documents: list[Document] = []
        while len(documents) < 2 or sum(len(document.facts) for document in documents) < questions:
            documents.append(draw_document(rng, people, FACTS_PER_PERSON[people], "test"))
        result.by_people[people] = ask_all_ways(model, documents)
    singles = result.by_people[sizes[0]].documents
    result.perplexity = perplexities(model, [document.text() for document in singles])
    result.context_bytes = context_bytes(model, singles[0].text())
    result.seconds = time.perf_counter() - started
    result.peak_rss_bytes = peak_bytes(torch.device("cpu"))
    return result


def ask_all_ways(model: GenerativeAdapter, documents: Sequence[Document]) -> SizeResult:
    """Every question of every document, asked in each way; `other_adapter` is the adapter of the next document."""
    texts = [document.text() for document in documents]
    owner = [number for number, document in enumerate(documents) for _ in document.facts]
    prompts, expected = zip(*[pair for document in documents for pair in document.questions()], strict=True)
    seconds: dict[str, float] = {}

    def timed(name: str, start: float) -> None:
        seconds[name] = time.perf_counter() - start

    start = time.perf_counter()
    adapters = model.adapt(texts)
    timed("contextualise", start)
    given: dict[str, list[str]] = {}
    with_document = [f"{texts[number]} {prompt}" for number, prompt in zip(owner, prompts, strict=True)]
    own = [adapters[number] for number in owner]
    other = [adapters[(number + 1) % len(adapters)] for number in owner]
    for way, asked, used in (
        ("closed_book", prompts, None),
        ("prompt", with_document, None),
        ("adapter", prompts, own),
        ("other_adapter", prompts, other),
    ):
        start = time.perf_counter()
        given[way] = answer(model, asked, used)
        timed(way, start)
    count = len(documents[0].facts)
    return SizeResult(
        questions=len(prompts),
        accuracy={way: accuracy(given[way], expected) for way in WAYS},
        any_person_level=sum(any_person_level(d) * len(d.facts) for d in documents) / len(prompts),
        seconds=seconds,
        documents=list(documents),
        examples=[
            {"question": prompts[i], "expected": expected[i], **{way: given[way][i] for way in WAYS}}
            for i in range(count)
        ],
    )


def answer(model: GenerativeAdapter, prompts: Sequence[str], adapters: Sequence[Adapter] | None = None) -> list[str]:
    """The greedy answers to prompts, up to the first full stop, each with its adapter or with the base model alone."""
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        with nullcontext() if adapters is None else model.adapted(adapters[part]):
            texts += model.generate(prompts[part], max_new_tokens=NEW_TOKENS)
    return [text.split(".")[0].strip() for text in texts]


def accuracy(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that are exactly as expected."""
    return sum(given == right for given, right in zip(answers, expected, strict=True)) / len(expected)


def perplexities(model: GenerativeAdapter, texts: Sequence[str]) -> dict[str, float]:
    """Perplexity of documents, closed-book: without an adapter, with their own, and with that of the next document."""
    adapters = model.adapt(texts)
    choices = {"none": None, "adapter": adapters, "other_adapter": [*adapters[1:], adapters[0]]}
    result = {}
    for name, chosen in choices.items():
        losses = [document_loss(model, text, chosen[i] if chosen else None) for i, text in enumerate(texts)]
        result[name] = math.exp(sum(total for total, _ in losses) / sum(tokens for _, tokens in losses))
    return result


@torch.no_grad()
def document_loss(model: GenerativeAdapter, text: str, adapter: Adapter | None) -> tuple[float, int]:
    """Negative log-likelihood of a text in nats, and the number of predicted tokens.

    The text is cut into even windows of at most the generator's chunk size; the first token of each is not predicted.

    Raises:
        InputError: the text is empty.
    """
    chunks = split_evenly(encode_context(model.tokenizer, text, first=True), model.config.chunk_size)
    input_ids, mask = (tensor.to(model.device) for tensor in pad_windows([[chunk] for chunk in chunks], pad=0))
    with model.adapted(adapter) if adapter is not None else nullcontext():
        output = model.decoder(input_ids=input_ids[:, 0], use_cache=False)
    target = mask.clone()
    target[..., 0] = False
    loss = token_losses(model, output.last_hidden_state[:, None], input_ids, {"text": target})["text"]
    return float(loss.total), int(loss.tokens)


def context_bytes(model: GenerativeAdapter, text: str) -> dict[str, int]:
    """The memory needed to answer about a document: for the key-value cache of the prompt, or for the adapter."""
    config = model.base.config.get_text_config()
    assert model.tokenizer is not None
    tokens = len(encode_text(model.tokenizer, text))
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size
    size = next(model.base.parameters()).element_size()
    return {"prompt": tokens * per_token * size, "adapter": model.adapt([text])[0].numbers() * size}
