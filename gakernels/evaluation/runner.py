"""Running methods on a scenario: contexts in shards, requests in batches, answers saved as they come."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from gakernels.distributed import Ranks
from gakernels.errors import InputError, check_least
from gakernels.evaluation.adapter_methods import (
    AdapterWithRetrieval,
    GeneratedAdapter,
    KeptCompact,
    MeanContext,
    MergedAdapter,
    OtherAdapter,
    StaticLoraControl,
    StreamedAdapter,
)
from gakernels.evaluation.answer_log import AnswerLog, Entry
from gakernels.evaluation.context_tuning import STEPS, ContextDistillation, SteppedTuning
from gakernels.evaluation.measuring import measured
from gakernels.evaluation.methods import ClosedBook, FullPrompt, Method, MethodSettings, Prepared
from gakernels.evaluation.prompt_methods import CachedPrompt, TruncatedPrompt
from gakernels.evaluation.prompts import Asker
from gakernels.evaluation.retrieval import EmbeddingRetrieval, Retrieval
from gakernels.evaluation.scenarios import Answer, Cell, EvaluationRequest, Measurements, Scenario, length_cell
from gakernels.evaluation.tuned_methods import ContextTuning, FewShotTuning, SupervisedTuning
from gakernels.generation.decoder import Decoder, Row, SharedStart, common_start, plan_batches
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import check_tokens

METHODS: dict[str, Callable[[GenerativeAdapter, Scenario, MethodSettings], Method]] = {
    "closed_book": ClosedBook,
    "prompt": FullPrompt,
    "prompt_cached": CachedPrompt,
    "prompt_truncated_first": TruncatedPrompt,
    "prompt_truncated_last": partial(TruncatedPrompt, last=True),
    "retrieval": Retrieval,
    "retrieval_embedding": EmbeddingRetrieval,
    "adapter": GeneratedAdapter,
    "adapter_streaming": StreamedAdapter,
    "adapter_merged": MergedAdapter,
    "adapter_compact": KeptCompact,
    "adapter_retrieval": AdapterWithRetrieval,
    "other_adapter": OtherAdapter,
    "mean_context": MeanContext,
    "static_lora": StaticLoraControl,
    "sft_lora": SupervisedTuning,
    "sft_full": partial(SupervisedTuning, kind="full"),
    "cpt_lora": partial(SupervisedTuning, continual=True),
    "cpt_full": partial(SupervisedTuning, kind="full", continual=True),
    "context_lora": ContextTuning,
    **{f"context_lora_{steps}": partial(SteppedTuning, steps=steps) for steps in STEPS},
    "context_distillation": ContextDistillation,
    "few_shot_lora": FewShotTuning,
    "few_shot_full": partial(FewShotTuning, kind="full"),
}

_LONG = timedelta(days=30)


@dataclass(frozen=True)
class RunSettings:
    """How the work is divided; the answers do not depend on it, except for rounding.

    Attributes:
        batch_tokens: limit of rows times tokens in a batch.
        max_rows: most rows in a batch.
        shard_contexts: most contexts whose adapters are held at once.
        shard_questions: questions, about, of the contexts held at once.
        alone: requests of each method that are also answered one by one, to measure the latency; 0 for none.

    Raises:
        InputError: a value is below 1, or `alone` below 0.
    """

    batch_tokens: int = 16_384
    max_rows: int = 64
    shard_contexts: int = 32
    shard_questions: int = 512
    alone: int = 3

    def __post_init__(self) -> None:
        check_least(1, **{**vars(self), "alone": None})
        check_least(0, alone=self.alone)


@dataclass(frozen=True)
class MethodRun:
    """Time, memory and counts of a method.

    Attributes:
        method: its name.
        fit_seconds: training on other data, once for all contexts.
        contextualization_seconds: per context.
        question_seconds: per request, in batches.
        latency_seconds: for a single request, the median of a few; None if none was asked alone.
        peak_bytes: memory.
        requests: number of answered requests.
        truncated: how many of them were too long for the model, which read only the end.
        left_out: cases that could not be asked, by reason.
        chosen: settings that the method chose for itself, by name.
    """

    method: str
    fit_seconds: float
    contextualization_seconds: float
    question_seconds: float
    latency_seconds: float | None
    peak_bytes: int
    requests: int
    truncated: int
    left_out: dict[str, int] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasuredCost:
    """What a context and a question about it cost with a method.

    Attributes:
        cell: cells of one length of context together (`length_cell`).
        method: its name.
        contextualization_seconds: per context.
        stored_bytes: of adapters and texts, per context.
        first_token_seconds: for a single question; the median of a few, as the next one. None if none was asked alone.
        tokens_per_second: from there on.
    """

    cell: Cell
    method: str
    contextualization_seconds: float
    stored_bytes: float
    first_token_seconds: float | None
    tokens_per_second: float | None


class Runner:
    """Runs a scenario on a model.

    Args:
        model: base model and generators.
        scenario: the evaluation to run.
        names: of the methods.
        log: stores the answers.
        method_settings: of the methods.
        settings: how the work is divided.
        ranks: the processes that share the work; each must see the files of the log.
        progress: whether to show a bar.

    Raises:
        InputError: there is no such method, a method lacks what it needs, or the model can't read a chunk at once.
    """

    def __init__(
        self,
        model: GenerativeAdapter,
        scenario: Scenario,
        names: Sequence[str],
        log: AnswerLog,
        method_settings: MethodSettings | None = None,
        settings: RunSettings | None = None,
        ranks: Ranks | None = None,
        progress: bool = True,
    ) -> None:
        unknown = [name for name in names if name not in METHODS]
        if unknown or not names:
            raise InputError(f"methods must be among {', '.join(METHODS)}, but they are {', '.join(names) or 'none'}")
        self.model, self.scenario, self.log = model, scenario, log
        self.settings, self.ranks = settings or RunSettings(), ranks or Ranks()
        self.decoder = Decoder(model)
        limit, chunk = self.decoder.limit, model.config.chunk_size
        if limit is not None and chunk > limit:
            raise InputError(f"the generator reads chunks of {chunk} tokens, but the base model at most {limit}")
        if limit is not None and scenario.new_tokens >= limit:
            raise InputError(f"new_tokens must be below the model's limit of {limit}, but it is {scenario.new_tokens}")
        self._known = model.base.get_input_embeddings().num_embeddings
        self.method_settings = method_settings or MethodSettings()
        self._asker = Asker(self.decoder.tokenizer, self.method_settings.chat)
        self.methods: dict[str, Method] = {
            name: METHODS[name](model, scenario, self.method_settings) for name in dict.fromkeys(names)
        }
        self._progress = progress and self.ranks.rank == 0

    def run(self) -> None:
        """Answer every request that the log has no answer to.

        Raises:
            InputError: a batch does not fit in memory.
        """
        # A separate process group: finished processes wait for the others as long as necessary.
        finish = dist.new_group(timeout=_LONG, backend="gloo") if self.ranks.world > 1 else None
        shards = list(self._shards())
        cells = [length_cell(self.scenario.cases[shard[0]].cell) for shard in shards]
        first = {cells.index(cell) for cell in cells}
        for name, method in self.methods.items():
            own = [
                (number in first, requests)
                for number, shard in enumerate(shards)
                if number % self.ranks.world == self.ranks.rank
                and (requests := self._open_requests(name, method, shard))
            ]
            if own:
                self._run_method(name, method, own)
        if finish is not None:
            dist.barrier(finish)
            self.log.reload()

    def measurements(self) -> dict[str, Measurements]:
        """The samples of every cell and metric, by method."""
        return {name: self.scenario.measure(self.scenario, self.log.answers(name)) for name in self.methods}

    def method_runs(self) -> list[MethodRun]:
        """Time, memory and counts of each method."""
        return [self._method_run(name, method) for name, method in self.methods.items()]

    def measured_costs(self) -> list[MeasuredCost]:
        """What contexts and questions cost, by length of the context and method."""
        cells = list(dict.fromkeys(length_cell(case.cell) for case in self.scenario.cases))
        return [
            cost for cell in cells for name in self.methods if (cost := self._measured_cost(cell, name)) is not None
        ]

    def _measured_cost(self, cell: Cell, name: str) -> MeasuredCost | None:
        facts = [fact for fact in self.log.facts(name) if fact.get("cell") == dict(cell)]
        contexts = sum(fact.get("contexts", 0) for fact in facts)
        if not contexts:
            return None  # every context of the cell was left out
        alone = next((fact for fact in facts if "first_token_seconds" in fact), {})
        return MeasuredCost(
            cell=cell,
            method=name,
            contextualization_seconds=sum(fact.get("seconds_preparing", 0) for fact in facts) / contexts,
            stored_bytes=sum(fact.get("stored_bytes", 0) for fact in facts) / contexts,
            first_token_seconds=alone.get("first_token_seconds"),
            tokens_per_second=alone.get("tokens_per_second"),
        )

    def _shards(self) -> Iterator[list[int]]:
        """Numbers of the cases that are held at once, all of one length; they depend on the scenario alone."""
        for _, cell in groupby(enumerate(self.scenario.cases), key=lambda numbered: length_cell(numbered[1].cell)):
            shard: list[int] = []
            questions = 0
            for number, case in cell:
                shard.append(number)
                questions += len(case.context.questions)
                if len(shard) >= self.settings.shard_contexts or questions >= self.settings.shard_questions:
                    yield shard
                    shard, questions = [], 0
            if shard:
                yield shard

    def _open_requests(self, name: str, method: Method, shard: Sequence[int]) -> list[EvaluationRequest]:
        """All requests of a shard if any of them is open; none if all are answered."""
        cases = self.scenario.cases
        requests = [
            request
            for number in shard
            if method.missing(cases[number]) is None
            for request in self.scenario.ask(number, cases[number])
        ]
        answered = self.log.answers(name)
        return [] if all(request.key in answered for request in requests) else requests

    def _run_method(
        self, name: str, method: Method, shards: Sequence[tuple[bool, Sequence[EvaluationRequest]]]
    ) -> None:
        """Ask the requests of each shard; in the first shard of a length some also one by one."""
        total = sum(len(requests) for _, requests in shards)
        with tqdm(total=total, desc=name, unit="request", disable=None if self._progress else True) as bar:
            try:
                with measured(self.model.device) as fit:
                    method.fit()
                facts = {"fit_seconds": fit.seconds, "peak_bytes": fit.peak_bytes, "chosen": dict(method.chosen)}
                self.log.add(Entry(name, (), facts))
                for alone, requests in shards:
                    self._run_shard(name, method, requests, bar, alone)
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"{name}: not enough memory for a batch of {self.settings.batch_tokens} tokens; continue with "
                    "a smaller --batch-tokens"
                ) from error

    def _run_shard(
        self, name: str, method: Method, requests: Sequence[EvaluationRequest], bar: tqdm[None], alone: bool
    ) -> None:
        numbers = list(dict.fromkeys(request.case for request in requests))
        places = {number: place for place, number in enumerate(numbers)}
        with measured(self.model.device) as preparing:
            prepared = method.prepare([self.scenario.cases[number] for number in numbers])
        rows = [self._row(request, places[request.case], prepared, method.adapted) for request in requests]
        cell = dict(length_cell(self.scenario.cases[numbers[0]].cell))
        facts = {"cell": cell, "contexts": len(numbers), "seconds_preparing": preparing.seconds}
        facts |= {"stored_bytes": prepared.kept_bytes(), "peak_bytes": preparing.peak_bytes}
        self.log.add(Entry(name, (), facts))
        for place, part in enumerate(self._parts(requests, prepared.separate)):
            weights = prepared.weights
            asked, read = [requests[number] for number in part], [rows[number] for number in part]
            kept = self._read_start(name, cell, prepared, places[asked[0].case], read)
            with nullcontext() if weights is None else weights(places[asked[0].case]):
                if alone and place == 0 and self.settings.alone:
                    self._ask_alone(name, cell, list(zip(asked, read, strict=True))[: self.settings.alone], kept)
                self._ask_part(name, asked, read, prepared.separate, bar, kept)

    def _read_start(
        self, name: str, cell: Mapping[str, str | int], prepared: Prepared, place: int, rows: Sequence[Row]
    ) -> SharedStart | None:
        """Read what a method keeps of the start of the prompts about a case; what these rows have of it."""
        if prepared.start is None:
            return None
        with measured(self.model.device) as reading:
            start = prepared.start(place)
        facts = {"cell": cell, "seconds_preparing": reading.seconds, "peak_bytes": reading.peak_bytes}
        self.log.add(Entry(name, (), {**facts, "stored_bytes": 0 if start is None else start.bytes()}))
        return None if start is None else common_start(start, rows)

    def _ask_part(
        self,
        name: str,
        requests: Sequence[EvaluationRequest],
        rows: Sequence[Row],
        separate: bool,
        bar: tqdm[None],
        shared: SharedStart | None = None,
    ) -> None:
        """Ask the open ones of requests that may share batches; if they are about one case, its start is read once."""
        answered = self.log.answers(name)
        if shared is None and separate and not all(request.key in answered for request in requests):
            with measured(self.model.device) as reading:
                shared = self.decoder.shared_start(rows)
            self.log.add(Entry(name, (), vars(reading)))
        for batch in self._batches(requests, rows):
            if not all(requests[number].key in answered for number in batch):
                self._ask(name, [requests[number] for number in batch], [rows[number] for number in batch], shared)
            bar.update(len(batch))

    @staticmethod
    def _parts(requests: Sequence[EvaluationRequest], separate: bool) -> list[list[int]]:
        """Numbers of the requests that may share a batch."""
        numbers = range(len(requests))
        if not separate:
            return [list(numbers)]
        return [list(part) for _, part in groupby(numbers, key=lambda number: requests[number].case)]

    def _batches(self, requests: Sequence[EvaluationRequest], rows: Sequence[Row]) -> Iterator[list[int]]:
        """Batches; generation and scoring are kept separate."""
        for generated in (True, False):
            kind = [number for number in range(len(rows)) if (requests[number].continuation is None) == generated]
            new = self.scenario.new_tokens if generated else 0
            lengths = [len(rows[number].tokens) + new for number in kind]
            for batch in plan_batches(lengths, self.settings.batch_tokens, self.settings.max_rows):
                yield [kind[number] for number in batch]

    def _row(self, request: EvaluationRequest, place: int, prepared: Prepared, adapted: bool) -> Row:
        """What the model reads for a request: its end, if the model can't read all of it."""
        text = request.adapted_prompt if adapted else request.prompt
        front = prepared.in_front(place, request.query)
        tokens, start, room = self._tokens(request, text, front)
        check_tokens(self.decoder.tokenizer, tokens, self._known, f"case {request.case}, question {request.question},")
        return self.decoder.row(tokens, start, room, prepared.adapters[place])

    def _tokens(self, request: EvaluationRequest, text: str, front: str | None) -> tuple[list[int], int, int]:
        """Token ids, the index of the first scored one, and how many will be generated."""
        if isinstance(request.continuation, tuple):
            head = self.decoder.begin() if front is None else self.decoder.encode(front)
            return [*head, *request.continuation], len(head) + 1, 0
        text = text if front is None else f"{front}\n\n{text}"
        if request.continuation is None:
            asked = self._asker.question(text)
            return asked, len(asked), self.scenario.new_tokens
        return *self._asker.answered(text, request.continuation), 0

    def _ask(
        self, name: str, requests: Sequence[EvaluationRequest], rows: Sequence[Row], shared: SharedStart | None
    ) -> None:
        with measured(self.model.device) as took:
            answers = self._answers(requests, rows, shared)
        keyed = tuple((request.key, answer) for request, answer in zip(requests, answers, strict=True))
        counts = {"requests": len(requests), "truncated": sum(row.cut for row in rows)}
        self.log.add(Entry(name, keyed, {**counts, **vars(took)}))

    def _ask_alone(
        self,
        name: str,
        cell: Mapping[str, str | int],
        asked: Sequence[tuple[EvaluationRequest, Row]],
        kept: SharedStart | None = None,
    ) -> None:
        """Measure how long a single answer takes; the first one is a warm-up and does not count."""
        seconds, first_token, rates = [], [], []
        for request, row in asked:
            with measured(self.model.device) as took:
                self._answers([request], [row], kept)
            seconds.append(took.seconds)
            if request.continuation is None:
                first, rate = self.decoder.speed(row, self.scenario.new_tokens, kept)
                first_token.append(first)
                rates.append(rate)
        facts = {"latency_seconds": _median(seconds), "first_token_seconds": _median(first_token)}
        self.log.add(Entry(name, (), {"cell": dict(cell), **facts, "tokens_per_second": _median(rates)}))

    def _answers(
        self, requests: Sequence[EvaluationRequest], rows: Sequence[Row], shared: SharedStart | None = None
    ) -> Sequence[Answer]:
        if requests[0].continuation is None:
            return self.decoder.generate(rows, self.scenario.new_tokens, self.scenario.stops, shared)
        return self.decoder.losses(rows, shared)

    def _method_run(self, name: str, method: Method) -> MethodRun:
        facts = self.log.facts(name)
        sums: dict[str, Any] = {
            key: sum(fact.get(key, 0) for fact in facts)
            for key in ("fit_seconds", "contexts", "seconds_preparing", "truncated", "requests", "seconds")
        }
        reasons = Counter(reason for case in self.scenario.cases if (reason := method.missing(case)) is not None)
        latency = [fact["latency_seconds"] for fact in facts if "latency_seconds" in fact]
        return MethodRun(
            method=name,
            fit_seconds=sums["fit_seconds"],
            contextualization_seconds=sums["seconds_preparing"] / max(sums["contexts"], 1),
            question_seconds=sums["seconds"] / max(sums["requests"], 1),
            latency_seconds=latency[0] if latency else None,
            peak_bytes=max((fact.get("peak_bytes", 0) for fact in facts), default=0),
            requests=len(self.log.answers(name)),
            truncated=sums["truncated"],
            left_out=dict(reasons),
            chosen=next((fact["chosen"] for fact in reversed(facts) if "chosen" in fact), {}),
        )


def _median(values: Sequence[float | None]) -> float | None:
    """Without the first, if there are more; None without any."""
    known = [value for value in values if value is not None]
    return statistics.median(known[1:] or known) if known else None
