"""The best passages of the context in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gakernels.evaluation.bm25 import Bm25, passages
from gakernels.evaluation.cases import Case
from gakernels.evaluation.methods.base import Prepared, SimpleMethod


class Retrieval(SimpleMethod):
    """BM25 over passages of 100 words; the best ones stand in front of the question, in the order of the text."""

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """Indexes the passages of each context."""
        return Prepared([None] * len(cases), self.retriever(cases))

    def retriever(self, cases: Sequence[Case]) -> Callable[[int, str], str]:
        """Finds the text for a query, by the number of the case among these."""
        indexes = {
            text: Bm25(passages(text, self.settings.passage_words))
            for text in dict.fromkeys(case.context.text for case in cases)
        }

        def find(number: int, query: str) -> str:
            return "\n\n".join(indexes[cases[number].context.text].best(query, self.settings.passages))

        return find
