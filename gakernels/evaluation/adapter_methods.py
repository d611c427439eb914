"""Methods that use an adapter: the generated one in all its forms, and its controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

import torch

from gakernels.adapters.adapter import Adapter
from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import InputError
from gakernels.evaluation.methods import Method, MethodSettings, Prepared
from gakernels.evaluation.retrieval import Retrieval
from gakernels.evaluation.scenarios import EvaluationCase, Scenario, parts
from gakernels.model import GenerativeAdapter

MEAN_CONTEXTS = 256


class GeneratedAdapter(Method):
    """The context is read at once, in even chunks, and its adapter is applied next to the weights."""

    adapted = True

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Makes the adapters, several contexts in a pass."""
        adapters = self.adapt([case.context.text for case in cases])
        return Prepared(adapters, kept=adapters)


class StreamedAdapter(Method):
    """The context arrives in pieces (its parts between empty lines: documents, sessions, demonstrations), each of which
    is read as it comes, with the adapter of those before it."""

    adapted = True

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Reads piece by piece."""
        adapters = [self.to_base(self._read(case.context.text)) for case in cases]
        return Prepared(adapters, kept=adapters)

    def _read(self, text: str) -> Adapter:
        stream = self.model.stream()
        for part in parts(text):
            stream.append(part)
        return stream.adapter()


class MergedAdapter(Method):
    """The adapter is added to the weights while questions about its context are asked."""

    adapted = True

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Makes the adapters."""
        adapters = self.adapt([case.context.text for case in cases])

        @contextmanager
        def weights(number: int) -> Iterator[None]:
            self.model.merge(adapters[number])
            try:
                yield
            finally:
                self.model.unmerge()

        return Prepared([None] * len(cases), weights=weights, separate=True, kept=adapters)


class KeptCompact(Method):
    """Only U and V are kept of a context. They are applied between A1 and B2 of the generator, without forming lora_A
    and lora_B.

    Raises:
        InputError: the generator's norm is `frobenius`.
    """

    adapted = True

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings)
        if model.config.norm == "frobenius":
            raise InputError("adapter_compact needs a generator with norm: polar; with frobenius there is no such form")

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Makes the compact adapters, several contexts in a pass."""
        texts = [case.context.text for case in cases]
        made: dict[str, CompactAdapter] = {}
        for read, states, lengths in self.states(texts):
            made |= zip(read, self.model.compact_adapters(states, lengths, self.model.base.dtype), strict=True)
        adapters = [made[text] for text in texts]
        return Prepared(adapters, kept=adapters)


class AdapterWithRetrieval(Retrieval):
    """The generated adapter, and the best passages in the prompt as well."""

    adapted = True

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Makes the adapters and indexes the passages."""
        texts = [case.context.text for case in cases]
        adapters = self.adapt(texts)
        return Prepared(adapters, self.retriever(cases), kept=[*adapters, *texts])


class OtherAdapter(Method):
    """Uses an adapter that knows nothing of this context: it separates the effect of the context from that of the
    generator's training."""

    adapted = True

    def missing(self, case: EvaluationCase) -> str | None:
        """There must be another context of the same kind."""
        return None if case.other is not None else "no other context of the same kind"

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Makes the adapters of the others."""
        others = [self.scenario.cases[case.other].context.text for case in cases if case.other is not None]
        adapters = self.adapt(others)
        return Prepared(adapters, kept=adapters)


class MeanContext(Method):
    """One adapter for all contexts: that of the mean state of up to 256 contexts of the training file, drawn by the
    seed. What it knows is the kind of text, but no context.

    Raises:
        InputError: there are no training contexts.
    """

    adapted = True

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings)
        if not scenario.training:
            raise InputError("mean_context needs training contexts; name their file with --train")
        self._adapter: Adapter | None = None

    def fit(self) -> None:
        """Read the contexts."""
        texts = list(dict.fromkeys(context.text for context in self.scenario.training))
        drawn = Random(self.settings.seed).sample(texts, min(len(texts), MEAN_CONTEXTS))
        total = {name: torch.zeros((), dtype=torch.float64) for name in self.model.adapted_names}
        tokens = 0
        for _, states, lengths in self.states(drawn):
            total = {name: total[name] + states[name].double().cpu().sum(0, keepdim=True) for name in total}
            tokens += sum(lengths)
        mean = {name: (state / len(drawn)).to(self.model.device, states[name].dtype) for name, state in total.items()}
        self._adapter = self.to_base(self.model.adapters(mean, [tokens])[0])

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """The same adapter for all."""
        return Prepared([self._adapter] * len(cases))


class StaticLoraControl(Method):
    """One adapter, read from a file, for all contexts.

    Raises:
        InputError: no file was named.
        FormatError: it belongs to another base model or other layers.
    """

    adapted = True

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings)
        if settings.static_lora is None:
            raise InputError("static_lora needs the file of a trained static LoRA; name it with --static-lora")
        adapter = Adapter.load(settings.static_lora)
        with model.adapted(adapter):  # refuses one of another model
            self._adapter = self.to_base(adapter)

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """The same adapter for all."""
        return Prepared([self._adapter] * len(cases))
