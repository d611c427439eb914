"""Whether adapters of several documents add up: questions about each document of a set, under adapters of the set."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import torch
from tqdm import tqdm

from gakernels.adapters.adapter import Adapter
from gakernels.data.chat import ChatEncoder
from gakernels.data.conversations import Message
from gakernels.errors import InputError
from gakernels.evaluation.datasets import EvaluationContext, Question
from gakernels.evaluation.measuring import measured
from gakernels.evaluation.metrics import Estimate, Sample, Samples, answer_f1, compare, score
from gakernels.evaluation.prompts import QA_NEW_TOKENS, QA_STOPS, Asker, qa_prompt
from gakernels.generation.decoder import Decoder, Row, plan_batches
from gakernels.model import GenerativeAdapter
from gakernels.model.stream import ContextStream

OWN = "own_adapter"
SINGLE = ("closed_book", "prompt", OWN, "other_adapter")
COMBINED = ("updates_added", "states_added", "one_stream")
METRICS = ("f1", "answer_perplexity")
BATCH_TOKENS, MAX_ROWS = 4096, 64


@dataclass(frozen=True)
class SetScore:
    """How well questions are answered in one way.

    Attributes:
        way: one of SINGLE or COMBINED.
        documents: in a set; 1 for those of SINGLE.
        metric: `f1` of generated answers, or the perplexity of the first gold answer.
        score: over all questions; sets are resampled.
        against_own: the difference from (of perplexities, the ratio to) the document's own adapter on the same
            questions; None for that itself.
    """

    way: str
    documents: int
    metric: str
    score: Estimate
    against_own: Estimate | None


@dataclass(frozen=True)
class SetScores:
    """All ways.

    Attributes:
        scores: by way, size of the sets and metric.
        documents: how many there are.
        questions: about all of them.
        seconds: to make the adapter of a set: its documents are read already, but for `one_stream`. By way and number
            of documents, the mean of all sets.
    """

    scores: list[SetScore]
    documents: int
    questions: int
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)


def measure_sets(
    model: GenerativeAdapter,
    contexts: Sequence[EvaluationContext],
    counts: Sequence[int],
    seed: int = 0,
    new_tokens: int = QA_NEW_TOKENS,
    progress: bool = True,
) -> SetScores:
    """Ask the questions of all documents in every way.

    Args:
        model: with a tokenizer.
        contexts: documents with questions; as many as fill sets of the largest size are drawn from them.
        counts: sizes of the sets.
        seed: of the draw, and of which documents are in a set.
        new_tokens: most tokens of an answer.
        progress: whether to show a bar.

    Raises:
        InputError: as for `check_counts` and `Decoder`.
    """
    check_counts(counts, len(contexts))
    most = max(counts)
    documents = Random(seed).sample(list(contexts), len(contexts) // most * most)
    asking = _Asking(model, documents, new_tokens, (len(SINGLE) + len(COMBINED) * len(set(counts))), progress)
    streams = [model.stream().append(document.text) for document in documents]
    own = [asking.to_base(stream.adapter()) for stream in streams]
    others = [*own[len(own) // 2 :], *own[: len(own) // 2]]
    nothing = [None] * len(documents)
    found = {
        ("closed_book", 1): asking.samples(1, nothing),
        ("prompt", 1): asking.samples(1, nothing, in_prompt=True),
        (OWN, 1): asking.samples(1, own),
        ("other_adapter", 1): asking.samples(1, others),
    }
    seconds: dict[str, dict[int, float]] = {way: {} for way in COMBINED}
    for count in sorted(set(counts)):
        sets = [range(start, min(start + count, len(documents))) for start in range(0, len(documents), count)]
        for way in COMBINED:
            with measured(model.device) as making:
                adapters = [asking.to_base(_combined(model, way, one, documents, streams, own)) for one in sets]
            seconds[way][count] = making.seconds / len(sets)
            found[way, count] = asking.samples(count, [adapters[number // count] for number in range(len(documents))])
    asking.close()
    scores = [
        SetScore(
            *key,
            metric,
            score(metric, samples[metric]),
            None if key == (OWN, 1) else compare(metric, samples[metric], found[OWN, 1][metric]),
        )
        for key, samples in found.items()
        for metric in METRICS
    ]
    return SetScores(scores, len(documents), sum(len(document.questions) for document in documents), seconds)


def check_counts(counts: Sequence[int], documents: int) -> None:
    """Raises: InputError: a count is below 2, or there are fewer documents than the largest."""
    if not counts or not 2 <= min(counts) <= max(counts) <= documents:
        shown = ", ".join(map(str, counts)) or "none"
        raise InputError(f"counts must be between 2 and the {documents} documents, but they are {shown}")


def _combined(
    model: GenerativeAdapter,
    way: str,
    numbers: Sequence[int],
    documents: Sequence[EvaluationContext],
    streams: Sequence[ContextStream],
    own: Sequence[Adapter],
) -> Adapter:
    """The adapter of a set of documents."""
    if way == "updates_added":
        return added_updates([own[number] for number in numbers])
    whole = model.stream()
    for number in numbers:
        if way == "states_added":
            whole.add(streams[number])
        else:
            whole.append(documents[number].text)
    return whole.adapter()


def added_updates(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter whose update of each weight is the sum of those of several, of the sum of their ranks.

    Args:
        adapters: at least one, of the same layers and scale.
    """
    first = adapters[0]
    return replace(
        first,
        lora_a={name: torch.cat([adapter.lora_a[name] for adapter in adapters]) for name in first.lora_a},
        lora_b={name: torch.cat([adapter.lora_b[name] for adapter in adapters], dim=1) for name in first.lora_b},
        tokens_seen=sum(adapter.tokens_seen for adapter in adapters),
    )


class _Asking:
    """Asks all questions of some documents, in one way after the other."""

    def __init__(
        self,
        model: GenerativeAdapter,
        documents: Sequence[EvaluationContext],
        new_tokens: int,
        ways: int,
        progress: bool,
    ) -> None:
        self._model, self._documents, self._new_tokens = model, documents, new_tokens
        self._decoder = Decoder(model)
        self._asker = Asker(self._decoder.tokenizer)
        self._chat = None if model.chat_template is None else ChatEncoder(self._decoder.tokenizer)
        total = ways * sum(len(document.questions) for document in documents)
        self._bar = tqdm(total=total, desc="asking", unit="question", disable=None if progress else True)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def to_base(self, adapter: Adapter) -> Adapter:
        """The adapter on the device and in the dtype of the base model."""
        return adapter.to(self._model.device, self._model.base.dtype)

    def samples(self, count: int, adapters: Sequence[Adapter | None], in_prompt: bool = False) -> dict[str, Samples]:
        """F1 and perplexities of all questions, by metric.

        Args:
            count: documents in a set; each set is a cluster.
            adapters: of each document; None for the base model alone.
            in_prompt: whether the document is in the prompt.
        """
        keys, asked, answered = [], [], []
        for number, document in enumerate(self._documents):
            for place, question in enumerate(document.questions):
                text = document.text if in_prompt else None
                keys.append((number, place, question))
                asked.append(self._asked(question, text, adapters[number]))
                answered.append(self._answered(question, text, adapters[number]))
        answers, losses = self._generate(asked), self._losses(answered)
        f1: dict[Hashable, Sample] = {}
        perplexity: dict[Hashable, Sample] = {}
        for (number, place, question), answer, loss in zip(keys, answers, losses, strict=True):
            f1[number, place] = Sample(number // count, answer_f1(answer, question.answers))
            perplexity[number, place] = Sample(number // count, *loss)
        return dict(zip(METRICS, (f1, perplexity), strict=True))

    def _asked(self, question: Question, text: str | None, adapter: Adapter | None) -> Row:
        """A question: to an adapted model as in its tuning, otherwise with an instruction."""
        if adapter is not None and self._chat is not None:
            tokens = self._chat.prompt([Message("user", question.text)])
        else:
            tokens = self._asker.question(qa_prompt(question.text, text))
        return self._decoder.row(tokens, len(tokens), self._new_tokens, adapter)

    def _answered(self, question: Question, text: str | None, adapter: Adapter | None) -> Row:
        """A question with its first gold answer, whose tokens are scored, but not the end of a turn."""
        gold = question.answers[0]
        if adapter is None or self._chat is None:
            return self._decoder.row(*self._asker.answered(qa_prompt(question.text, text), gold), adapter=adapter)
        encoded = self._chat.encode([Message("user", question.text), Message("assistant", gold)])
        if isinstance(encoded, str):
            raise InputError(f"the answer {gold!r} can't be written in the generator's chat template: {encoded}")
        special = self._decoder.tokenizer.all_special_ids
        tokens = encoded.tokens.tolist()
        scored = [place for place, token in enumerate(tokens) if encoded.answers[place] and token not in special]
        return self._decoder.row(tokens[: scored[-1] + 1], scored[0], adapter=adapter)

    def _generate(self, rows: Sequence[Row]) -> list[str]:
        answers = [""] * len(rows)
        for batch in self._batches(rows, self._new_tokens):
            generated = self._decoder.generate([rows[number] for number in batch], self._new_tokens, QA_STOPS)
            for number, answer in zip(batch, generated, strict=True):
                answers[number] = answer
            self._bar.update(len(batch))
        return answers

    def _losses(self, rows: Sequence[Row]) -> list[tuple[float, int]]:
        """Summed loss and number of scored tokens of each row."""
        losses = [(0.0, 0)] * len(rows)
        for batch in self._batches(rows, 0):
            scored = self._decoder.losses([rows[number] for number in batch])
            for number, loss in zip(batch, scored, strict=True):
                losses[number] = loss
        return losses

    @staticmethod
    def _batches(rows: Sequence[Row], new_tokens: int) -> list[list[int]]:
        return plan_batches([len(row.tokens) + new_tokens for row in rows], BATCH_TOKENS, MAX_ROWS)
