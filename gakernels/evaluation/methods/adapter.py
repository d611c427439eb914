"""The generated adapter: of the context as a whole, read piece by piece, or merged into the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gakernels.adapters.adapter import Adapter
from gakernels.evaluation.cases import Case, parts
from gakernels.evaluation.methods.base import Prepared, SimpleMethod
from gakernels.evaluation.methods.retrieval import Retrieval


class GeneratedAdapter(SimpleMethod):
    """The context is read at once, in even chunks, and its adapter stands beside the weights."""

    adapted = True

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """Makes the adapters, several contexts in a pass."""
        return Prepared(self.adapt([case.context.text for case in cases]))


class StreamedAdapter(SimpleMethod):
    """The context arrives in pieces (its parts between empty lines: documents, sessions, demonstrations), each of which
    is read as it comes, with the adapter of those before it."""

    adapted = True

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """Reads piece by piece."""
        return Prepared([self.to_base(self._read(case.context.text)) for case in cases])

    def _read(self, text: str) -> Adapter:
        stream = self.model.stream()
        for part in parts(text):
            stream.append(part)
        return stream.adapter()


class MergedAdapter(SimpleMethod):
    """The adapter is added to the weights for as long as questions about its context are asked."""

    adapted = True

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """Makes the adapters."""
        adapters = self.adapt([case.context.text for case in cases])

        @contextmanager
        def weights(number: int) -> Iterator[None]:
            self.model.merge(adapters[number])
            try:
                yield
            finally:
                self.model.unmerge()

        return Prepared([None] * len(cases), weights=weights, separate=True)


class AdapterWithRetrieval(Retrieval):
    """The generated adapter, and the best passages in the prompt as well."""

    adapted = True

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """Makes the adapters and indexes the passages."""
        return Prepared(self.adapt([case.context.text for case in cases]), self.retriever(cases))
